"""Convert decoded pixels to RGB as viewers show it: upright, in sRGB, transparent parts on white."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
"""Pillow allows 64 MiB of text in a PNG, but only 1 MiB in one chunk; editors write more (XMP)."""

ORIENTATION = 0x0112
"""The EXIF tag for the orientation of the image."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Colour space of a profile -> mode of its pixels."""
_SCALES = {"L;2": 85, "L;4": 17}
"""Pillow scales the levels of these PNGs to 0..255, but not the transparent level; factors for that."""
_SAME = 2
"""A profile that moves no colour by more levels than this counts as sRGB and is ignored."""


class UnreadProfile(UserWarning):
    """The colour profile of an image cannot be used; its values are read as sRGB."""

    most_lines = 3
    """Number of these warnings that a command prints; it counts the others."""


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Unreadable EXIF is ignored."""
    try:
        turn = _TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged bytes can raise any error
        turn = None
    return image if turn is None else image.transpose(turn)


def to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """An image in sRGB, upright and on white, and the fault of its colour profile ("" if it has none).

    Of 16 bits the upper 8 are kept.

    Raises:
        ValueError: the pixels are 32-bit numbers of unknown range.
    """
    tiles = getattr(image, "tile", ())
    stored, kind = str(tiles[0].args) if tiles else "", image.format
    image.load()
    info = image.info
    image = _in_8_bits(upright(image), stored, kind)
    grey = image.mode in ("1", "L", "LA", "La")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
    image, fault = _in_srgb(image, grey, info.get("icc_profile"))
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if not info.get("icc_profile", True):  # Pillow sets None if the parts of a profile do not fit
        fault = "its parts do not fit together"
    return image, fault


def _in_8_bits(image: Image.Image, stored: str, kind: str | None) -> Image.Image:
    """The image with 8 bits per channel, its transparent value in the scale that Pillow expects."""
    value = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode, kind) == ("I", "PPM"):
        levels = np.asarray(image)
        image = Image.fromarray((levels >> 8).astype(np.uint8))  # Pillow would clip values above 255
        if value is not None:
            image.putalpha(Image.fromarray(np.where(levels == value, 0, 255).astype(np.uint8)))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}) of unknown range, save 8 or 16 bits"
        )
    elif value is not None and stored in _SCALES:
        image.info["transparency"] = value * _SCALES[stored]
    elif value is not None and stored == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in value)
    return image


def _in_srgb(image: Image.Image, grey: bool, profile: bytes | None) -> tuple[Image.Image, str]:
    """The image in sRGB, and the fault of its profile."""
    fault = ""
    try:
        if image.mode == "LAB" or profile:
            transform, mode = _transform(profile, image.mode, grey)
            if transform is not None:
                return ImageCms.applyTransform(image.convert(mode), transform), ""  # type: ignore[return-value]
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        fault = str(error)
    return image.convert("RGB"), fault


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str, grey: bool) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform from a profile (CIELab if None) to sRGB, and the mode of its input.

    The transform is None if the profile is sRGB up to rounding.
    """
    source = ImageCms.createProfile("LAB") if profile is None else io.BytesIO(profile)
    opened = ImageCms.ImageCmsProfile(source)
    space = opened.profile.xcolor_space.strip()
    wanted = _SPACES.get(space, "")
    special = mode if mode in ("CMYK", "LAB") else "RGB"
    if wanted != special and not (wanted == "L" and grey):
        raise ValueError(f"it is for {space} pixels, and the image holds {'L' if grey else special}")
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(opened, srgb, wanted, "RGB")
    if wanted in ("RGB", "L"):
        levels = np.linspace(0, 255, 18 if wanted == "RGB" else 256).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        colours = Image.fromarray(grid if wanted == "RGB" else levels[None])
        moved = np.asarray(ImageCms.applyTransform(colours, transform)).astype(int)
        if np.abs(moved - np.asarray(colours.convert("RGB")).astype(int)).max() <= _SAME:
            return None, wanted
    return transform, wanted
