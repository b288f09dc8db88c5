"""Reading and writing pictures: picture files are touched through this module alone.

Pixels are float32 in [0, 1]. What a restorer does not change (alpha, colour profile, EXIF, gray,
bit depth) travels beside them in a `Picture` and is written back.
"""

import glob
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mimdit.decoding import decode
from mimdit.encoding import encode, quantised
from mimdit.errors import first_line
from mimdit.metadata import Metadata, metadata_options
from mimdit.picture import Picture, PictureError
from mimdit.png_chunks import other_than_srgb

WRITE_FORMATS = (
    {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
    | dict.fromkeys((".jpg", ".jpeg", ".jfif"), "JPEG")
    | dict.fromkeys((".tif", ".tiff"), "TIFF")
)
READ_SUFFIXES = frozenset(WRITE_FORMATS) | {".gif", ".pgm", ".ppm", ".avif"}

# How a TIFF begins: little or big endian, the last two with addresses of 64 bits.
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ALPHA_FORMATS = ("PNG", "WEBP", "TIFF")
_DEEP_FORMATS = ("PNG", "TIFF")
# The longest side that a format can hold.
_SIDES = {"WEBP": 16383, "JPEG": 65500}


def read_picture(path: str | Path) -> Picture:
    """Decode the picture at `path`; of an animation or a document, the first page, with a note.

    Palette, gray and 1-bit pictures become RGB, CMYK and Lab ones sRGB by their profile, with a
    note. 16 bits are kept for gray (PNG, TIFF, PGM) and colour (PNG, TIFF), but for TIFFs that are
    compressed plane by plane, of which a note says so.

    Raises:
        PictureError: no such file, not a picture, truncated, empty or too large.
    """
    path = Path(path)
    # Other than those of Path, these do not raise for names too long or folders that are closed.
    if not os.path.exists(path):
        raise PictureError(f"{path}: no such file; check the path")
    if os.path.isdir(path):
        raise PictureError(f"{path}: is a folder; give a picture file")
    try:
        if path.stat().st_size == 0:
            raise PictureError(f"{path}: the file is empty (0 bytes); copy or download it again")
        return decode(path)
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise PictureError(
            f"{path}: more than {limit:.4g} million pixels; cut it into smaller pictures first"
        ) from None
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            start = file.read(4)
        if start in _TIFF:
            raise PictureError(
                f"{path}: a damaged TIFF, or one of a rare kind; save it again with 8 or 16 bits"
            ) from None
        raise PictureError(
            f"{path}: not a picture of a known type; give PNG, JPEG, WebP, TIFF, BMP or GIF"
        ) from None
    except PermissionError:
        raise PictureError(f"{path}: no permission to read it; check the file's rights") from None
    # The decoders let many types through on damaged data: OSError, SyntaxError, struct.error ...
    except Exception as error:
        raise PictureError(
            f"{path}: damaged or truncated ({_reason(error)}); copy or download it again"
        ) from error


def write_picture(
    path: str | Path, rgb: np.ndarray, like: Picture | None = None, quality: int = 95
) -> tuple[str, ...]:
    """Write a picture whole or not at all; the suffix of `path` picks the format.

    Alpha goes to PNG, WebP and TIFF; profile, EXIF and XMP to everything but BMP; IPTC to JPEG and
    TIFF; resolution to everything but WebP; 16 bits to PNG and TIFF; comments to JPEG and PNG; the
    texts of a PNG to PNG, and those that EXIF has a tag for to JPEG, WebP and TIFF. A colour
    profile that does not fit the written channels is left out.

    Args:
        path: file to write or replace.
        rgb: float [H, W, 3]; values outside [0, 1] are clipped.
        like: the source, whose alpha, profile, metadata, gray and bit depth are kept.
        quality: 1 to 100, of JPEG and WebP; a WebP without loss stays one.

    Returns:
        What the format could not hold, in words for a user.

    Raises:
        PictureError: non-finite values, a suffix that cannot be written, a picture too large for
            the format, or a failed write.
        ValueError: a wrong shape.
    """
    path, rgb = Path(path), np.asarray(rgb, dtype=np.float32)
    if rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"rgb: expected shape [H, W, 3], got {list(rgb.shape)}")
    kind = check_target(path, *rgb.shape[:2])
    # Extremes are NaN where any value is, and need no copy.
    if not (np.isfinite(rgb.min()) and np.isfinite(rgb.max())):
        raise PictureError(
            f"{path}: the result has non-finite values and was not written; try --precision fp32"
        )
    like, notes = like or Picture(rgb), []
    # [H, W, C], C = 1 to 4; the weights are the luma of ITU-R BT.601
    planes = rgb @ np.array([[0.299], [0.587], [0.114]], np.float32) if like.gray else rgb
    if like.alpha is not None:
        if like.alpha.shape != rgb.shape[:2]:
            raise ValueError(f"rgb: expected size {like.alpha.shape}, got {rgb.shape[:2]}")
        if kind in _ALPHA_FORMATS:
            planes = np.concatenate([planes, like.alpha[..., None]], axis=2)
        else:
            notes.append(f"{kind} holds no transparency")
    deep = like.bits == 16 and kind in _DEEP_FORMATS
    if like.bits == 16 and not deep:
        notes.append(f"{kind} holds 8 of 16 bits")
    if deep and kind == "TIFF" and planes.shape[2] == 2:
        planes = np.repeat(planes, (3, 1), axis=2)
        notes.append(
            "16-bit gray with transparency was written as colour, which more programs read"
        )
    pixels = quantised(planes, *((65535, np.uint16) if deep else (255, np.uint8)))
    icc = like.icc
    if icc is not None and kind == "BMP":
        icc, notes = None, [*notes, "BMP holds no colour profile"]
    elif icc is not None:
        space = b"GRAY" if pixels.shape[2] < 3 and kind != "WEBP" else b"RGB "
        if icc[16:20] != space:
            icc, notes = None, [*notes, "the colour profile is of other channels and was left out"]
    if icc is None and kind != "PNG" and other_than_srgb(like.colours):
        names = " and ".join(name.decode() for name, _ in like.colours)
        notes.append(f"{kind} holds no {names}, which say what the colours are; they may shift")
    try:
        held = Metadata(
            like.exif,
            like.xmp,
            like.dpi,
            iptc=like.iptc,
            texts=like.texts,
            colours=like.colours,
            comments=like.comments,
        )
        options, lost = metadata_options(kind, held)
        if kind == "WEBP":
            options["lossless"] = like.lossless
        write_bytes(path, encode(pixels, kind, icc, options, quality))
    except (OSError, ValueError, RuntimeError) as error:
        raise PictureError(f"{path}: cannot be written ({_reason(error)})") from error
    return (*notes, *lost)


def check_target(path: str | Path, height: int, width: int) -> str:
    """Pillow's name of the format that `path` will have; cheap, so ask before a long run.

    Raises PictureError for a suffix that cannot be written, or a picture that its format cannot
    hold.
    """
    path = Path(path)
    kind = WRITE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise PictureError(f"{path}: cannot write {path.suffix!r}; use .png, .jpg, .webp or .tif")
    most = _SIDES.get(kind)
    if most is not None and max(height, width) > most:
        raise PictureError(
            f"{path}: {kind} holds at most {most} pixels a side, this has {width}×{height}; "
            "use .png or .tif"
        )
    return kind


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at `path` in one step, so that a reader never sees half of it.

    What is replaced leaves its rights. Raises OSError; `path` is then as it was.
    """
    # In the same folder, because os.replace does not cross file systems.
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
            # Else a name may be on the disk before its bytes, when the power fails.
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def find_pictures(pattern: str | Path) -> list[Path]:
    """Pictures that a file, folder (not its subfolders) or glob names, sorted by name.

    A file is taken whatever its suffix. In folders and globs suffixes count in any case, and
    hidden files do not. Raises PictureError where nothing is found.
    """
    path = Path(pattern)
    if os.path.isdir(path):
        found = list(path.iterdir())
        missing = f"{path}: no pictures in this folder; give one that holds .png, .jpg or .webp"
    elif os.path.exists(path):
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


def _reason(error: Exception) -> str:
    """The first line of an error as part of a sentence."""
    return first_line(error).rstrip(".")
