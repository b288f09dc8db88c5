"""`mimdit.restore`: from a picture to the restored one in one call."""

import os
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimdit.image_io import Picture, PictureError, check_target, read_picture, write_picture
from mimdit.inputs import to_tensor
from mimdit.pipeline import MiMDiTPipeline

# Models that stay in memory for the next call.
_MODELS = 2
# The buffers of a model serve one picture at a time.
_TURN = threading.RLock()
_GRAY_MODES = ("1", "L", "LA", "La")
# Of seeds, as torch takes them.
_LARGEST = 2**63 - 1


class Options(TypedDict, total=False):
    """The options of `restore`, which describes them."""

    model: str | os.PathLike[str] | MiMDiTPipeline
    device: str
    precision: str | None
    steps: int | None
    shifts: int | None
    seed: int
    strength: float
    color_fix: str
    guidance_scale: float
    tile: int
    tile_overlap: int
    tile_batch: int | None
    routing: str
    experts: Mapping[str, float] | None
    progress: Callable[[int, int], object] | None
    overwrite: bool


@overload
def restore(
    image: str | os.PathLike[str] | Image.Image,
    output: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Image.Image: ...
@overload
def restore(
    image: np.ndarray, output: str | os.PathLike[str] | None = None, **options: Unpack[Options]
) -> np.ndarray: ...
@overload
def restore(
    image: Tensor, output: str | os.PathLike[str] | None = None, **options: Unpack[Options]
) -> Tensor: ...
def restore(
    image: str | os.PathLike[str] | Image.Image | np.ndarray | Tensor,
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | MiMDiTPipeline = "tiny",
    device: str = "auto",
    precision: str | None = None,
    steps: int | None = None,
    shifts: int | None = None,
    seed: int = 0,
    strength: float = 1.0,
    color_fix: str = "none",
    guidance_scale: float = 1.0,
    tile: int = 0,
    tile_overlap: int = 64,
    tile_batch: int | None = None,
    routing: str = "picture",
    experts: Mapping[str, float] | None = None,
    progress: Callable[[int, int], object] | None = None,
    overwrite: bool = False,
) -> Image.Image | np.ndarray | Tensor:
    """Restore a picture; what comes back is of the kind that was given.

    The same picture, seed and options give what `mimdit-restore` writes.

    Args:
        image: a file (orientation applied), a PIL picture, numpy [H,W,3] or [B,H,W,3] (floats in
            [0,1], uint8 or uint16), or torch [3,H,W] or [B,3,H,W] in [0,1].
        output: a file to write, too, with the metadata, profile and transparency of `image` where
            that is a file, and its depth. Not for batches.
        model: name of a shipped model, folder, hub id, or a pipeline. The last two that were named
            stay in memory, until their files change.
        device: "auto", "cuda", "cuda:N", "mps" or "cpu". precision: "fp32", "bf16" or "fp16".
            Neither counts for a pipeline.
        steps: `num_inference_steps` of the pipeline, whose call describes the other options.
        seed: of the noise, at least 0.
        overwrite: replace `output` where it exists.

    Returns:
        PIL for files and PIL pictures (gray, transparency, 16-bit gray and the colour profile are
        kept; colour has 8 bits), an array of the same shape and type, or a float32 tensor on the
        CPU.

    Raises:
        PictureError: a picture that cannot be read or written, or an `output` that exists.
        ValueError, OSError: an argument out of range, or no such model.
    """
    if isinstance(image, (str, os.PathLike)):
        picture: Picture | None = read_picture(os.fspath(image))
        given: Any = picture.rgb
    elif isinstance(image, Image.Image):
        picture, given = _picture(image), image
    elif isinstance(image, (np.ndarray, Tensor)):
        picture, given = None, image
    else:
        raise ValueError(
            f"image: expected the path of a file, PIL, numpy or torch, got {type(image).__name__}"
        )
    if not (isinstance(seed, (int, np.integer)) and 0 <= seed <= _LARGEST):
        raise ValueError(f"seed: expected a whole number from 0 to {_LARGEST}, got {seed!r}")
    source = to_tensor(given)
    if output is not None:
        _check_output(Path(output), source, overwrite)
    with _TURN:
        pipe = model if isinstance(model, MiMDiTPipeline) else _named(model, device, precision)
        restored = pipe(
            image=source,
            generator=torch.Generator("cpu").manual_seed(int(seed)),
            output_type="np",
            num_inference_steps=steps,
            shifts=shifts,
            guidance_scale=guidance_scale,
            strength=strength,
            color_fix=color_fix,
            tile=tile,
            tile_overlap=tile_overlap,
            tile_batch=tile_batch,
            routing=routing,
            experts=experts,
            progress=progress,
        ).images  # [B,H,W,3]
    if output is not None:
        deep = isinstance(image, np.ndarray) and (image.dtype.kind, image.itemsize) == ("u", 2)
        like = picture or Picture(restored[0], bits=16 if deep else 8)
        write_picture(os.fspath(output), restored[0], like)
    if picture is not None:
        return _as_pil(restored[0], picture)
    if isinstance(image, Tensor):
        return torch.from_numpy(restored).movedim(-1, -3).reshape(image.shape)
    return _as_array(restored, given)


def pick_device(wanted: str) -> str:
    """A device by name; "auto" is the best there is. Raises ValueError for one that is not here."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    numbers = range(torch.cuda.device_count() if cuda else 0)
    here = ["cpu", *["mps"] * mps, *["cuda"] * cuda, *(f"cuda:{i}" for i in numbers)]
    if wanted not in here:
        raise ValueError(f"device {wanted} is not available here; use auto or cpu")
    return wanted


def _named(model: str | os.PathLike[str], device: str, precision: str | None) -> MiMDiTPipeline:
    name = os.fspath(model)
    # Files of a folder that training writes again are another model.
    changed = max((p.stat().st_mtime_ns for p in Path(name).rglob("*.*")), default=0)
    return _loaded(name, pick_device(device), precision, changed)


@lru_cache(maxsize=_MODELS)
def _loaded(name: str, device: str, precision: str | None, changed: int) -> MiMDiTPipeline:
    from mimdit.engine import accelerate
    from mimdit.loading import load_pipeline

    pipe = load_pipeline(name, device, precision)
    pipe.set_progress_bar_config(disable=True)
    return accelerate(pipe)


def _check_output(path: Path, source: Tensor, overwrite: bool) -> None:
    """Before the work: a file that cannot be written, or must not."""
    if len(source) != 1:
        raise ValueError(f"output: expected one picture, got a batch of {len(source)}")
    check_target(path, *source.shape[-2:])
    if not os.path.isdir(path.parent):
        raise PictureError(f"{path.parent}: no such file or folder; check the path")
    if os.path.lexists(path) and not overwrite:
        raise PictureError(f"{path}: exists; pass overwrite=True to replace it")


def _picture(image: Image.Image) -> Picture:
    """A picture in memory, as `image_io.Picture`."""
    rgb = to_tensor(image)[0].movedim(0, -1).numpy()
    alpha = None
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A")).astype(np.float32) / 255
    deep = image.mode[0] in "IF"
    gray = deep or image.mode in _GRAY_MODES
    return Picture(rgb, alpha, 16 if deep else 8, image.info.get("icc_profile"), gray=gray)


def _as_pil(rgb: np.ndarray, like: Picture) -> Image.Image:
    """[H,W,3] in [0,1] as PIL, gray, transparent and deep as `like` is, where PIL has such."""
    if like.gray and like.bits == 16 and like.alpha is None:
        made = Image.fromarray(_whole(_luma(rgb), np.dtype(np.uint16)))
    else:
        planes = _luma(rgb)[..., None] if like.gray else rgb
        if like.alpha is not None:
            planes = np.concatenate([planes, like.alpha[..., None]], axis=-1)
        pixels = _whole(planes, np.dtype(np.uint8))
        made = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if like.icc is not None and like.icc[16:20] == (b"GRAY" if like.gray else b"RGB "):
        made.info["icc_profile"] = like.icc
    return made


def _luma(rgb: np.ndarray) -> np.ndarray:
    """[H,W] of ITU-R BT.601."""
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32)


def _as_array(restored: np.ndarray, like: np.ndarray) -> np.ndarray:
    shaped = restored.reshape(like.shape)
    # In any byte order.
    if like.dtype.kind == "u":
        return _whole(shaped, like.dtype)
    return shaped.astype(like.dtype if like.dtype.kind == "f" else np.float32)


def _whole(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Values in [0,1] as whole numbers of a type."""
    return np.rint(values.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)
