"""Readers of the published data sets' folders, and of anyone's own pairs.

`read(name, path)` lists the pairs of a data set; `LAYOUTS` names them. Nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.datasets.metadata import foundir_lines
from training.datasets.pairs import (
    Fault,
    Listing,
    Pair,
    child,
    found_at,
    keyed,
    match,
    natural,
    pictures,
)
from training.degrade import FOUNDIR_TYPES

SPLITS = ("train", "val", "test")

# Pairs of each folder of FoundIR's test set (arXiv 2412.01427).
FOUNDIR_TEST = dict.fromkeys(FOUNDIR_TYPES, 50) | {
    "01Blur": 150,
    "05Noise": 100,
    "08Haze": 200,
    "09Lowlight_Haze": 100,
    "10Rain": 100,
    "11Raindrop": 100,
    "15Lowlight_Blur": 100,
}
# More pairs than that are not the test set with some files too many.
_FOUNDIR_TEST_AT_MOST = 10 * sum(FOUNDIR_TEST.values())
REALRAIN = {"train": 784, "val": 112, "test": 224}
UHDLL = {"train": ("training_set", 2000), "test": ("testing_set", 150)}
# Visual ranges that HazeRD simulates of each of its 15 scenes.
HAZERD_SCENES, HAZERD_RANGES = 15, 5

DAMAGED_NAMES = ("lq", "damaged", "input", "inputs", "degraded", "blur", "blurry", "hazy", "rainy")
DAMAGED_NAMES += ("noisy", "low", "lr")
CLEAN_NAMES = ("gt", "clean", "target", "targets", "sharp", "original", "high", "hq", "hr", "clear")


def foundir(path: Path, split: str | None) -> Listing:
    """FoundIR: `NNName/{GT,LQ}/0001.png` for its 20 types, also below `train`, `val` or `test`, or
    a metadata file of lines `01Blur/GT/0001.png, 01Blur/LQ/0001.png`. The published counts are
    those of the test set.
    """
    if path.is_file():
        return foundir_lines(path)
    parts = []
    known = {name.lower(): name for name in FOUNDIR_TYPES}
    path = (child(path, split) if split else None) or path
    folders = sorted(path.iterdir()) if path.is_dir() else []
    for folder in folders:
        name = known.get(folder.name.lower())
        if name is None or not folder.is_dir():
            continue
        clean, damaged = child(folder, "GT"), child(folder, "LQ")
        if clean is None or damaged is None:
            parts.append(_lacks(folder, "GT and LQ"))
        else:
            parts.append(match(damaged, clean, name, FOUNDIR_TYPES[name], f"{name}/"))
    for file in sorted(path.glob("*.txt")) if parts else []:
        listed = foundir_lines(file)
        parts.append(Listing(faults=listed.faults))
    found = Listing.merge(parts)
    # The training set has a million, and no published numbers by type.
    training = len(found.pairs) > _FOUNDIR_TEST_AT_MOST
    counted = parts and (split == "test" or (split is None and not training))
    return Listing.merge([found, Listing(published=FOUNDIR_TEST if counted else {})])


def uhdll(path: Path, split: str | None) -> Listing:
    """UHD-LL: `{training_set,testing_set}/{input,gt}/N_UHD_LL.JPG`."""
    parts = []
    for part, (name, count) in UHDLL.items():
        folder = child(path, name)
        if folder is None or split not in (None, part):
            continue
        parts.append(_halves(folder, "gt", name, "low_light", f"{name}/"))
        parts.append(Listing(published={name: count}))
    return Listing.merge(parts)


def realrain(path: Path, split: str | None) -> Listing:
    """RealRain-1K: `RealRain-1k-{L,H}/{train,val,test}/{input,target}`; PATH may be one of both."""
    own = path.name.lower().startswith("realrain-1k-")
    folders = [path] if own else [child(path, f"RealRain-1k-{density}") for density in "LH"]
    parts = []
    for folder in (each for each in folders if each is not None):
        for part, count in REALRAIN.items():
            half = child(folder, part)
            if half is None or split not in (None, part):
                continue
            group = folder.name if split else f"{folder.name}/{part}"
            parts.append(_halves(half, "target", group, "rain", f"{folder.name}/{part}/"))
            parts.append(Listing(published={group: count}))
    return Listing.merge(parts)


def hazerd(path: Path, split: str | None) -> Listing:
    """HazeRD: `data/{img,simu}`; the original of `simu/a_b_*.jpg` is `img/a_b_RGB.jpg`."""
    folder = child(path, "data") or path
    clean, damaged = child(folder, "img"), child(folder, "simu")
    if clean is None or damaged is None:
        return Listing()
    targets, faults = keyed(clean, lambda name: name[:-4] if name.endswith("_RGB") else None)
    inputs, more = keyed(damaged)
    faults += more
    pairs, ranges = [], dict.fromkeys(targets, 0)
    for name in sorted(inputs, key=natural):
        scene = "_".join(name.split("_")[:2])
        if scene in targets:
            ranges[scene] += 1
            pairs.append(Pair(name, inputs[name], targets[scene], "HazeRD", ("haze",)))
        else:
            text = f"has no original {scene}_RGB in {clean}"
            faults.append(Fault("unmatched", str(inputs[name]), text))
    for scene, count in ranges.items():
        if count == 0:
            text = f"has no hazy picture {scene}_* in {damaged}"
            faults.append(Fault("unmatched", str(targets[scene]), text))
        elif count != HAZERD_RANGES:
            text = f"expected {HAZERD_RANGES} hazy pictures of this scene, got {count}"
            faults.append(Fault("count", str(targets[scene]), text))
    published = {"HazeRD": HAZERD_SCENES * HAZERD_RANGES}
    return Listing(tuple(pairs), tuple(faults), published)


def fourkrd(path: Path, split: str | None) -> Listing:
    """4KRD: sequences with `blur`, `blurry` or `input` beside `sharp`, `gt` or `target`."""
    root = (child(path, split) if split else None) or path
    if not root.is_dir():
        return Listing()
    parts = []
    for folder in sorted([root, *(each for each in root.rglob("*") if each.is_dir())]):
        damaged = child(folder, "blur", "blurry", "input")
        clean = child(folder, "sharp", "gt", "target")
        prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        if damaged is not None and clean is not None:
            parts.append(match(damaged, clean, "4KRD", ("blur",), prefix))
        elif damaged is not None:
            parts.append(_lacks(folder, "sharp, gt or target"))
        elif clean is not None:
            parts.append(_lacks(folder, "blur, blurry or input"))
    return Listing.merge(parts)


def folder(path: Path, split: str | None) -> Listing:
    """Any two folders such as `input` and `target`, or `LQ` and `GT`, matched by file name; or
    damaged pictures alone. Sub-folders of both name the rows of a results table.
    """
    root = (child(path, split) if split else None) or path
    damaged, clean = child(root, *DAMAGED_NAMES), child(root, *CLEAN_NAMES)
    if damaged is not None and clean is not None:
        return paired(damaged, clean)
    if damaged is not None or clean is not None or not root.is_dir():
        return Listing()
    found, faults = keyed(root)
    alone = (Pair(n, p, None, _row(n), _kinds_of(_row(n))) for n, p in found.items())
    return Listing(tuple(alone), tuple(faults))


def paired(damaged: Path, clean: Path) -> Listing:
    """Pairs of the files of two folders that have the same relative path but for extensions.

    Raises ValueError where one of them is not a folder.
    """
    for name, each in (("damaged", damaged), ("clean", clean)):
        if not each.is_dir():
            raise ValueError(f"{name}: expected a folder, got {each}")
    return match(damaged, clean, _row, lambda name: _kinds_of(_row(name)))


def clean_only(path: Path, split: str | None) -> Listing:
    """Any folder of clean pictures, to be degraded on the fly."""
    root = (child(path, split) if split else None) or path
    return Listing(singles=tuple(pictures(root)) if root.is_dir() else ())


def _row(name: str) -> str:
    """The sub-folder that a relative path begins with, or "all"."""
    return name.split("/")[0] if "/" in name else "all"


def _kinds_of(row: str) -> tuple[str, ...]:
    known = {name.lower(): kinds for name, kinds in FOUNDIR_TYPES.items()}
    return known.get(row.lower(), ())


def _halves(folder: Path, original: str, group: str, kind: str, prefix: str) -> Listing:
    """Pairs of a folder's `input` and `original`, or that one of them lacks."""
    damaged, clean = child(folder, "input"), child(folder, original)
    if damaged is None or clean is None:
        return _lacks(folder, f"input and {original}")
    return match(damaged, clean, group, (kind,), prefix)


def _lacks(path: Path, expected: str) -> Listing:
    return Listing(faults=(Fault("layout", str(path), f"expected the folders {expected} here"),))


@dataclass(frozen=True)
class Layout:
    """A reader of a folder, and what it expects in one phrase."""

    read: Callable[[Path, str | None], Listing]
    expected: str


LAYOUTS: dict[str, Layout] = {
    "foundir": Layout(foundir, "folders 01Blur … 20Lowlight_Noise_JPEG, each with GT and LQ"),
    "uhdll": Layout(uhdll, "training_set or testing_set, each with input and gt"),
    "realrain": Layout(
        realrain, "RealRain-1k-L and RealRain-1k-H, each {train,test}/{input,target}"
    ),
    "hazerd": Layout(hazerd, "data/img with a_b_RGB.jpg and data/simu with a_b_*.jpg"),
    "4krd": Layout(fourkrd, "sequences with blur, blurry or input beside sharp, gt or target"),
    "folder": Layout(folder, "two folders such as input and target, or LQ and GT, or pictures"),
    "clean": Layout(clean_only, "pictures at any depth"),
}


def read(name: str, path: str | Path, split: str | None = None) -> Listing:
    """The pairs of the data set at `path`, in one of the `LAYOUTS`.

    split: "train", "val" or "test" of those that have them; None takes all that are there.
    Raises ValueError for an unknown name or split, and where nothing fits the layout.
    """
    if name not in LAYOUTS:
        raise ValueError(f"dataset: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(path)
    layout = LAYOUTS[name]
    if not path.exists():
        raise ValueError(f"{name}: expected {layout.expected} in {path}, which does not exist")
    listing = layout.read(path, split)
    if not (listing.pairs or listing.singles):
        part = f" (split {split})" if split else ""
        reason = "".join(f"; {fault.path}: {fault.message}" for fault in listing.faults[:1])
        expected = f"{name}: expected {layout.expected} in {path}{part}"
        raise ValueError(f"{expected}, got {found_at(path)}{reason}")
    return listing


def prefer(name: str, path: str | Path, wanted: str, split: str | None = None) -> Listing:
    """The pairs of `split`; without one of the split `wanted` where the data set at `path` has
    pictures of it, else all that are there. Errors as of `read`."""
    if split is not None:
        return read(name, path, split)
    try:
        return read(name, path, wanted)
    except ValueError:
        return read(name, path)


def detect(path: str | Path) -> str:
    """The name of the layout that a folder has; ValueError where it has none."""
    path = Path(path)
    for name, layout in LAYOUTS.items() if path.exists() else ():
        listing = layout.read(path, None)
        if name == "4krd":
            # Folders called `input` and `gt` are anyone's.
            named = (pair.damaged.relative_to(path).parts[:-1] for pair in listing.pairs)
            if any(part.lower() in ("blur", "blurry") for parts in named for part in parts[1:]):
                return name
        elif listing.pairs or any(fault.kind == "layout" for fault in listing.faults):
            return name
    names = "; ".join(f"{name}: {layout.expected}" for name, layout in LAYOUTS.items())
    expected = f"expected one of the layouts of these data sets: {names}"
    raise ValueError(f"{path}: {expected}; got {found_at(path)}")
