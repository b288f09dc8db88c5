"""Pictures in inks or in Lab, as RGB."""

import io

from PIL import Image

# Pillow's own types that need a profile to become RGB.
SPACES = ("CMYK", "LAB")


def to_srgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None, str]:
    """(RGB picture, its profile, a note) of a picture in one of `SPACES`.

    By its own profile where it has one that fits, else by the plain formula. Raises ValueError or
    OSError for Lab where Pillow was built without LittleCMS.
    """
    name = {"CMYK": "CMYK", "LAB": "Lab"}[image.mode]
    try:
        from PIL import ImageCms

        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        if image.mode == "LAB":
            own = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif icc is not None and icc[16:20] == b"CMYK":
            own = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        else:
            raise ValueError("no profile")
        turned = ImageCms.profileToProfile(
            image,
            own,
            srgb,
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            "RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        assert turned is not None
        how = "" if image.mode == "LAB" else " by its colour profile"
        return turned, srgb.tobytes(), f"{name} was converted to sRGB{how}"
    # No profile, a damaged one, or no LittleCMS; that one's own error is a plain Exception.
    except Exception as error:
        if image.mode == "LAB":
            raise ValueError(f"Lab cannot be converted: {error}") from error
        plain = image.convert("RGB")
        return plain, None, "CMYK was converted to RGB without a colour profile; colours may shift"
