"""From an image file to RGB pixels."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from openpae.data.colour import UnreadProfile, shown

R = TypeVar("R")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, told by content and not by name. Pillow knows more, but its EPS starts Ghostscript."""
MAX_ASPECT = 100
"""Largest ratio of an image's sides: 1 x 60,000 pixels would fill gigabytes once the short side is 256."""


class BrokenImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


def read_image(path: Path) -> Image.Image:
    """Decode a still image to RGB as viewers show it: upright, in sRGB, transparent parts on white.

    16 bits become 8 by their upper half. The content says which format it is, whatever the name says. A
    colour profile that cannot be used is an `UnreadProfile` warning.

    Raises:
        BrokenImage: it cannot be decoded, or not without a guess: animated, 32-bit pixels of unknown range,
            sides of more than 100 to 1, or more pixels than Pillow takes for honest (178,956,970). The
            message names the file and the reason.
    """
    image, fault = decoded(path, _checked)
    if fault:
        text = f"the colour profile of {path} cannot be used: {fault}; its numbers are taken as sRGB"
        warnings.warn(text, UnreadProfile, stacklevel=2)
    return image


def decoded(path: Path, convert: Callable[[Image.Image], R]) -> R:
    """What a function makes of an image file.

    Raises:
        BrokenImage: the file cannot be decoded, or the function raises; the message names the file.
        MemoryError, OSError: memory or file handles ran out, which is no fault of the file.
    """
    try:
        # Opened here, as Pillow leaves a file open that it cannot read from.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            return convert(image)
    except UnidentifiedImageError:
        reason = f"no known image format ({' '.join(FORMATS)})"
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # the machine's fault, not the file's
            raise
        reason = error.strerror or str(error)
    except MemoryError:
        raise MemoryError(f"out of memory at {path}") from None
    except Exception as error:  # the bytes of a damaged file can lead a decoder to any of them
        reason = str(error) or type(error).__name__
    raise BrokenImage(f"{path} cannot be decoded: {reason}")


def _checked(image: Image.Image) -> tuple[Image.Image, str]:
    # A phone's MPO holds further views or a gain map behind the picture that every viewer shows.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError(f"it has {image.n_frames} frames or pages, save one as a still image")  # type: ignore[attr-defined]
    if max(image.size) > MAX_ASPECT * min(image.size):
        sides = f"{image.width} x {image.height}"
        raise ValueError(f"its sides are {sides} pixels, more than {MAX_ASPECT} to 1; crop it")
    return shown(image)
