"""Decode image files to RGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from openpae.data.colour import UnreadProfile, to_srgb
from openpae.data.fingerprints import MACHINE_ERRORS

R = TypeVar("R")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Accepted formats, detected from the content. Other Pillow formats are unsafe: EPS starts Ghostscript."""
MAX_ASPECT = 100
"""Largest ratio of an image's sides: 1 x 60,000 pixels scaled to a short side of 256 take gigabytes."""


class BrokenImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


def read_image(path: Path, data: bytes | None = None) -> Image.Image:
    """Decode a still image to RGB as viewers show it: upright, in sRGB, transparent parts on white.

    Of 16 bits the upper 8 are kept. The content determines the format, not the file name. An unusable colour
    profile raises an `UnreadProfile` warning.

    Args:
        path: the file.
        data: its content, if it is part of an archive; then `path` is its name in messages.

    Raises:
        BrokenImage: the file cannot be decoded, is animated, has 32-bit pixels of unknown range, sides of
            more than 100 to 1, or more than 178,956,970 pixels (Pillow's limit). The message names the file
            and the reason.
    """
    image, fault = decode_file(path, _checked, data)
    if fault:
        text = f"the colour profile of {path} cannot be used: {fault}; its numbers are taken as sRGB"
        warnings.warn(text, UnreadProfile, stacklevel=2)
    return image


def decode_file(path: Path, convert: Callable[[Image.Image], R], data: bytes | None = None) -> R:
    """Open an image file, or its content `data`, and return `convert(image)`.

    Raises:
        BrokenImage: the file cannot be decoded, or `convert` raises; the message names the file.
        MemoryError, OSError: memory or file handles ran out.
    """
    try:
        # Pillow would not close a file that it cannot read.
        with (
            path.open("rb") if data is None else io.BytesIO(data) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            return convert(image)
    except UnidentifiedImageError:
        reason = f"no known image format ({' '.join(FORMATS)})"
    except OSError as error:
        if error.errno in MACHINE_ERRORS:  # not caused by the file
            raise
        reason = error.strerror or str(error)
    except MemoryError:
        raise MemoryError(f"out of memory at {path}") from None
    except Exception as error:  # damaged bytes can raise any error
        reason = str(error) or type(error).__name__
    raise BrokenImage(f"{path} cannot be decoded: {reason}")


def _checked(image: Image.Image) -> tuple[Image.Image, str]:
    # Viewers show the first picture of a phone's MPO; further views or a gain map follow it.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError(f"it has {image.n_frames} frames or pages, save one as a still image")  # type: ignore[attr-defined]
    if max(image.size) > MAX_ASPECT * min(image.size):
        sides = f"{image.width} x {image.height}"
        raise ValueError(f"its sides are {sides} pixels, more than {MAX_ASPECT} to 1; crop it")
    return to_srgb(image)
