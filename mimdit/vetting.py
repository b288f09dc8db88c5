"""Whether a folder holds a model, before anything in it is built or run."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from mimdit.errors import first_line
from mimdit.transformer import MiMDiTTransformer2DModel

# Whose classes a folder may name; of any other package, naming it would run it.
_LIBRARIES = ("mimdit.transformer", "mimdit.codec", "diffusers", "transformers")
# What the class of a component that every pipeline has is called, or ends with.
_NEEDED = {
    "transformer": ("MiMDiTTransformer2DModel",),
    "vae": ("PixelCodec", "AutoencoderKL"),
    "scheduler": ("Scheduler",),
}
# Bytes of a header; safetensors itself reads no more.
_HEADER = 100_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_folder(folder: Path) -> None:
    """ValueError in one sentence unless a pipeline's transformer can be loaded from `folder`.

    Reads the JSON files and the heads of the weights. What they say of sizes is compared before
    memory is asked for.
    """
    index = _json(folder / "model_index.json")
    for name, part in index.items():
        if name.startswith("_") or not isinstance(part, list):
            continue
        if len(part) != 2 or part[0] not in (*_LIBRARIES, None):
            raise ValueError(
                f"model_index.json: {name}: expected a class of mimdit, diffusers or transformers, "
                f"got {part}"
            )
    for name, kinds in _NEEDED.items():
        part = index.get(name)
        if not isinstance(part, list) or not str(part[1]).endswith(kinds):
            raise ValueError(
                f"model_index.json: {name}: expected a {' or '.join(kinds)}, got {part}"
            )
    if not isinstance(index.get("_class_name", ""), str):
        raise ValueError(
            "model_index.json: _class_name: expected a name, got a class of the folder's own"
        )
    config = _json(folder / "transformer" / "config.json")
    stored = _shapes(folder / "transformer")
    blocks = {n.split(".")[1] for n in stored if n.startswith("transformer_blocks.")}
    places, width = _table(stored)
    heads, head = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(head, int):
        product: object = heads * head
    else:
        product = None if heads is None or head is None else (heads, head)
    # What takes time or memory even in layers without data.
    for name, value, found in (
        ("num_layers", config.get("num_layers"), len(blocks)),
        ("pos_embed_max_size", config.get("pos_embed_max_size"), places),
        ("num_attention_heads · attention_head_dim", product, width),
    ):
        if value is not None and value != found:
            raise ValueError(f"config.json: {name}: expected {found}, as the weights, got {value}")
    if index.get("vae") == ["mimdit.codec", "PixelCodec"]:
        factor = _json(folder / "vae" / "config.json").get("factor")
        if not isinstance(factor, int) or factor < 1 or 3 * factor**2 != config.get("in_channels"):
            raise ValueError(
                f"config.json: factor: expected that of {config.get('in_channels')} channels "
                f"(3·f²), got {factor}"
            )
    try:
        with torch.device("meta"):
            # Diffusers declares a pair that only another argument gives.
            model: Any = MiMDiTTransformer2DModel.from_config(config)
    # Wrong names and types fail anywhere in the layers that are built from them.
    except Exception as error:
        raise ValueError(f"config.json: not of this model ({first_line(error)})") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(n for n in {*wanted, *stored} if wanted.get(n) != stored.get(n))
    if wrong:
        raise ValueError(
            f"not the weights of this model: {len(wrong)} tensors differ ({wrong[0]}, …)"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name}: expected JSON; copy or download the model again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: expected a JSON object, got {type(found).__name__}")
    return found


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors in the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        found = f"got {pickles[0]}, which could run programs" if pickles else "found none"
        raise ValueError(f"expected weights as safetensors, {found}")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        header = _header(path)
        header.pop("__metadata__", None)
        try:
            shapes |= {name: tuple(map(int, info["shape"])) for name, info in header.items()}
        except (TypeError, KeyError, ValueError):
            raise _broken(path) from None
    return shapes


def _header(path: Path) -> dict[str, Any]:
    """The JSON head: its length in 8 bytes, little end first, stands before it."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER + 1
        data = file.read(length) if length <= _HEADER else b""
    try:
        found = json.loads(data) if len(data) == length else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _broken(path)
    return found


def _broken(path: Path) -> ValueError:
    return ValueError(f"{path.name}: damaged or truncated; copy or download the model again")


def _table(stored: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Places along the table of positions [1, n², D], and their width D."""
    shape = stored.get("pos_embed.pos_embed", ())
    return (round(max(shape[1], 0) ** 0.5), shape[2]) if len(shape) == 3 else (0, 0)
