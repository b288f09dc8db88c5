"""Reading and writing pictures: the only module that touches picture files.

Pixels are float32 in [0, 1]. What a restorer does not change (alpha, colour profile, EXIF, gray,
bit depth) travels beside them in a `Picture` and is written back.
"""

import glob
import io
import os
import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mimdit.deep_colour import deep_planes, encode_deep_png

WRITE_FORMATS = (
    {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
    | dict.fromkeys((".jpg", ".jpeg", ".jfif"), "JPEG")
    | dict.fromkeys((".tif", ".tiff"), "TIFF")
)
READ_SUFFIXES = frozenset(WRITE_FORMATS) | {".gif", ".pgm", ".ppm", ".avif"}

# Pillow also opens formats that start other programs (EPS), so the list is closed.
_OPEN_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
_ALPHA_FORMATS = ("PNG", "WEBP", "TIFF")
_GRAY_MODES = ("1", "L", "LA", "La")
_ORIENTATION = 0x0112
# Tags that describe the stored strips of a TIFF, its profile and its XMP, not the photograph.
_STORAGE_TAGS = (
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324),
    *(325, 330, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532, 700, 33723, 34377, 34675),
)


class PictureError(ValueError):
    """A picture that cannot be read, written or found; the message is one sentence for a user."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture and what has to be written back with it.

    Attributes:
        rgb: float32 [H, W, 3] in [0, 1], upright (EXIF orientation applied).
        alpha: float32 [H, W] in [0, 1], or None.
        bits: 8 or 16, the depth of one channel in the file.
        icc: the ICC profile, or None.
        exif: an EXIF block with the orientation reset to upright, or None.
        gray: whether the file holds one gray channel; `rgb` then repeats it.
        format: Pillow's name of the format, such as "PNG", whatever the suffix says.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    bits: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    gray: bool = False
    format: str = "PNG"


def read_picture(path: str | Path) -> Picture:
    """Decode the picture at `path`; of an animation, the first frame.

    Palette, gray, 1-bit and CMYK pictures become RGB. 16 bits are kept for gray (PNG, TIFF, PGM)
    and for interleaved colour (PNG, TIFF); TIFFs stored plane by plane are read with 8 bits.

    Raises:
        PictureError: no such file, not a picture, truncated, empty or too large.
    """
    path = Path(path)
    if not path.exists():
        raise PictureError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise PictureError(f"{path}: is a folder; give a picture file")
    try:
        if path.stat().st_size == 0:
            raise PictureError(f"{path}: the file is empty (0 bytes); copy or download it again")
        # Pillow warns about odd metadata of pictures that it decodes well.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(path)
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise PictureError(
            f"{path}: more than {limit} million pixels; cut it into smaller pictures first"
        ) from None
    except UnidentifiedImageError:
        raise PictureError(
            f"{path}: not a picture of a known type; give PNG, JPEG, WebP, TIFF, BMP or GIF"
        ) from None
    except PermissionError:
        raise PictureError(f"{path}: no permission to read it; check the file's rights") from None
    # The decoders let many types through on damaged data: OSError, SyntaxError, struct.error ...
    except Exception as error:
        raise PictureError(
            f"{path}: damaged or truncated ({_one_line(error)}); copy or download it again"
        ) from error


def write_picture(
    path: str | Path, rgb: np.ndarray, like: Picture | None = None, quality: int = 95
) -> None:
    """Write a picture whole or not at all; the suffix of `path` picks the format.

    Alpha goes to PNG, WebP and TIFF; profile and EXIF to everything but BMP; 16 bits to PNG, and
    to TIFF where the picture is gray without alpha. A colour profile that does not fit the written
    channels (that of a CMYK source) is left out.

    Args:
        path: file to write or replace.
        rgb: float [H, W, 3]; values outside [0, 1] are clipped.
        like: the source, whose alpha, profile, EXIF, gray and bit depth are kept.
        quality: 1 to 100, of JPEG and WebP.

    Raises:
        PictureError: non-finite values, a suffix that cannot be written, or a failed write.
        ValueError: a wrong shape.
    """
    path = Path(path)
    kind = WRITE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise PictureError(f"{path}: cannot write {path.suffix!r}; use .png, .jpg, .webp or .tif")
    rgb = np.asarray(rgb, dtype=np.float32)
    if rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"rgb: expected shape [H, W, 3], got {list(rgb.shape)}")
    if not np.isfinite(rgb).all():
        raise PictureError(
            f"{path}: the result has non-finite values and was not written; try --precision fp32"
        )
    like = like or Picture(rgb)
    # [H, W, C], C = 1 to 4; the weights are the luma of ITU-R BT.601
    planes = rgb @ np.array([[0.299], [0.587], [0.114]], np.float32) if like.gray else rgb
    if like.alpha is not None and kind in _ALPHA_FORMATS:
        if like.alpha.shape != rgb.shape[:2]:
            raise ValueError(f"rgb: expected size {like.alpha.shape}, got {rgb.shape[:2]}")
        planes = np.concatenate([planes, like.alpha[..., None]], axis=2)
    deep = like.bits == 16 and (kind == "PNG" or (kind == "TIFF" and planes.shape[2] == 1))
    top, dtype = (65535, np.uint16) if deep else (255, np.uint8)
    pixels = np.rint(planes.clip(0, 1) * top).astype(dtype)
    space = b"GRAY" if pixels.shape[2] < 3 and kind != "WEBP" else b"RGB "
    icc = like.icc if like.icc is not None and like.icc[16:20] == space else None
    try:
        if deep and pixels.shape[2] > 1:
            data = encode_deep_png(pixels, icc, like.exif)
        else:
            data = _encode(pixels, kind, icc, like.exif, quality)
        write_bytes(path, data)
    except (OSError, ValueError, RuntimeError) as error:
        raise PictureError(f"{path}: cannot be written ({_one_line(error)})") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at `path` in one step, so that a reader never sees half of it.

    Raises OSError from the file system; `path` is then as it was.
    """
    # In the same folder, because os.replace does not cross file systems.
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def find_pictures(pattern: str | Path) -> list[Path]:
    """Pictures that a file, folder (not its subfolders) or glob names, sorted by name.

    A file is taken whatever its suffix. In folders and globs suffixes count in any case, and
    hidden files do not. Raises PictureError where nothing is found.
    """
    path = Path(pattern)
    if path.is_dir():
        found = list(path.iterdir())
        missing = f"{path}: no pictures in this folder; give one that holds .png, .jpg or .webp"
    elif path.exists():
        return [path]
    elif glob.has_magic(str(pattern)):
        found = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
        missing = f"{path}: no picture matches; check the pattern"
    else:
        raise PictureError(f"{path}: no such file or folder; check the path")
    seen = [each for each in found if each.is_file() and not each.name.startswith(".")]
    pictures = [each for each in seen if each.suffix.lower() in READ_SUFFIXES]
    if not pictures:
        raise PictureError(missing)
    return sorted(pictures)


def compare(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Two pictures [H, W, 3] side by side with a thin white line between: [H, 2 W + line, 3].

    Raises ValueError where the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"after: expected shape {before.shape}, got {after.shape}")
    height, width, channels = before.shape
    line = np.ones((height, max(2, width // 256), channels), before.dtype)
    return np.concatenate([before, line, after.astype(before.dtype)], axis=1)


def _decode(path: Path) -> Picture:
    # With `formats` given, Pillow neither loads its rarer readers nor passes over absent ones.
    Image.init()
    formats = [name for name in _OPEN_FORMATS if name in Image.OPEN]
    with Image.open(path, formats=formats) as image:
        if 0 in image.size:
            raise PictureError(f"{path}: has no pixels; copy or download it again")
        form = image.format or ""
        planes, bits = deep_planes(image, path), 16
        if planes is None:
            planes, bits = _planes(path, image)
        # Only now: a PNG may hold its EXIF behind the pixels, and a TIFF is turned when decoded.
        exif, orientation = _exif(image)
        icc = image.info.get("icc_profile") or None
    upright = np.ascontiguousarray(_turn(planes, orientation), dtype=np.float32)
    channels = upright.shape[2]
    alpha = upright[..., -1].copy() if channels in (2, 4) else None
    gray = channels < 3
    rgb = np.repeat(upright[..., :1], 3, axis=2) if gray else upright[..., :3].copy()
    return Picture(rgb, alpha, bits, icc, exif, gray, form)


def _planes(path: Path, image: ImageFile.ImageFile) -> tuple[np.ndarray, int]:
    """Planes [H, W, 1..4] in [0, 1] and the bit depth, by the modes that Pillow has."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)[..., None]
        if values.min() < 0 or values.max() > 65535:
            raise PictureError(f"{path}: has 32-bit values; save it with 16 bits")
        return values / 65535, 16
    if image.mode == "F":
        values = np.asarray(image)[..., None]
        if not (values.min() >= 0 and values.max() <= 1):
            raise PictureError(f"{path}: has values outside [0, 1]; save it with 16 bits")
        return values, 16
    mode = "L" if image.mode in _GRAY_MODES else "RGB"
    if image.has_transparency_data:
        mode = "LA" if mode == "L" else "RGBA"
    values = np.asarray(image.convert(mode), dtype=np.float32)
    return values.reshape(*values.shape[:2], -1) / 255, 8


def _turn(planes: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [H, W, C] upright; the cases are the values of EXIF tag 0x0112."""
    if orientation in (5, 7):
        planes = planes.swapaxes(0, 1)
    if orientation in (2, 4):
        planes = planes[:, ::-1]
    return np.rot90(planes, {3: 2, 4: 2, 6: -1, 7: 2, 8: 1}.get(orientation, 0))


def _exif(image: ImageFile.ImageFile) -> tuple[bytes | None, int]:
    """The EXIF block with its orientation reset, and what the orientation was."""
    try:
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        for tag in _STORAGE_TAGS:
            if tag in exif:
                del exif[tag]
        if _ORIENTATION in exif:
            exif[_ORIENTATION] = 1
        return exif.tobytes() if len(exif) else None, orientation
    # A damaged block fails in as many ways as damaged pixels, and is no reason to lose those.
    except Exception:
        return None, 1


def _encode(
    pixels: np.ndarray, kind: str, icc: bytes | None, exif: bytes | None, quality: int
) -> bytes:
    options: dict[str, Any] = {
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"quality": quality, "exact": True},
        # Pillow's compressed TIFFs lose the directories inside EXIF (exposure, position).
        "TIFF": {} if exif else {"compression": "tiff_adobe_deflate"},
    }.get(kind, {})
    # One JPEG segment holds at most 65,533 bytes.
    if exif is not None and not (kind == "JPEG" and len(exif) > 65533):
        options["exif"] = exif
    if icc is not None:
        options["icc_profile"] = icc
    buffer = io.BytesIO()
    plane = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(plane).save(buffer, kind, **options)
    return buffer.getvalue()


def _one_line(error: Exception) -> str:
    """The first line of an error, without a full stop, or its type where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
