"""From decoded pixels to what a viewer shows of them: upright, in sRGB, transparent parts on white."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
"""Pillow allows 64 MiB of text in a PNG, but only 1 MiB in one chunk; editors write more (XMP)."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a viewer turns the image."""
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
"""Mode of the pixels that a profile of each colour space is for."""
_SCALES = {"L;2": 85, "L;4": 17}
"""Pillow spreads the levels of these PNGs over 0 to 255, but not the level that is transparent."""
_SAME = 2
"""Levels by which a profile may move a colour and still count as sRGB, which changes no pixel."""


class UnreadProfile(UserWarning):
    """An image has a colour profile that cannot be used; its numbers are taken as sRGB."""

    most_lines = 3
    """How many of them a command prints; it counts the others."""


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says; EXIF that cannot be read says nothing, the pixels are sound."""
    try:
        turn = _TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged bytes can lead the parser to any error
        turn = None
    return image if turn is None else image.transpose(turn)


def shown(image: Image.Image) -> tuple[Image.Image, str]:
    """An image as RGB as viewers show it, and what is wrong with its colour profile ("" if nothing is).

    16 bits become 8 by their upper half.

    Raises:
        ValueError: its pixels are 32-bit numbers, whose range nobody knows.
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
    if not info.get("icc_profile", True):  # Pillow's mark of a profile that it could not put together
        fault = "its parts do not fit together"
    return image, fault


def _in_8_bits(image: Image.Image, stored: str, kind: str | None) -> Image.Image:
    """The image with 8 bits a channel, and its transparent value as Pillow wants it."""
    value = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode, kind) == ("I", "PPM"):
        levels = np.asarray(image)
        image = Image.fromarray((levels >> 8).astype(np.uint8))  # Pillow would clip all above 255 to white
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
    """RGB in sRGB, and why the profile could not be used."""
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
    """From the profile (CIELab's own if there is none) to sRGB, and the mode that it takes.

    None where the profile is sRGB to within rounding.
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
