"""FoundIR's lists of pairs."""

from __future__ import annotations

from pathlib import Path

from training.datasets.pairs import Fault, Listing, Pair, natural
from training.degrade import FOUNDIR_TYPES


def foundir_lines(file: Path) -> Listing:
    """Pairs of a metadata file: clean, comma, damaged, both relative to the file's folder."""
    pairs, faults = [], []
    known = {name.lower(): name for name in FOUNDIR_TYPES}
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return Listing(faults=(Fault("metadata", str(file), "expected lines of UTF-8 text"),))
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        names = [part.strip() for part in line.split(",")]
        kind = known.get(Path(names[0]).parts[0].lower()) if Path(names[0]).parts else None
        if len(names) != 2 or kind is None:
            expected = "expected 01Blur/GT/0001.png, 01Blur/LQ/0001.png"
            faults.append(Fault("metadata", f"{file}:{number}", f"{expected}, got {line!r}"))
            continue
        clean, damaged = (file.parent / name for name in names)
        absent = [
            name for name, each in zip(names, (clean, damaged), strict=True) if not each.is_file()
        ]
        if absent:
            faults.append(
                Fault("metadata", f"{file}:{number}", f"names {absent[0]}, which is not there")
            )
            continue
        # What follows 01Blur/LQ.
        parts = Path(names[1]).with_suffix("").parts
        name = "/".join([kind, *(parts[2:] or parts[-1:])])
        pairs.append(Pair(name, damaged, clean, kind, FOUNDIR_TYPES[kind]))
    return Listing(tuple(sorted(pairs, key=lambda pair: natural(pair.name))), tuple(faults))
