"""Sizes, scaling and crops of decoded images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = int | tuple[int, int]
"""Height and width in pixels, or the side of a square."""


def height_width(size: Size) -> tuple[int, int]:
    """(H, W) of a size."""
    return (size, size) if isinstance(size, int) else size


def plain_size(size: Size) -> int | list[int]:
    """A size as JSON stores it: one number for a square, else [height, width]."""
    height, width = height_width(size)
    return height if height == width else [height, width]


def resize_to_cover(image: Image.Image, size: Size) -> Image.Image:
    """Scale proportionally to the smallest size that covers H x W.

    As in ADM: box filter by 2 while both sides are at least twice too large, then bicubic.
    """
    height, width = height_width(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    scaled = (round(image.width * scale), round(image.height * scale))
    return image if scaled == image.size else image.resize(scaled, Image.Resampling.BICUBIC)


def covers(shape: tuple[int, int], size: Size) -> bool:
    """Whether `resize_to_cover` leaves an image of this (H, W) unchanged."""
    height, width = height_width(size)
    return max(height / shape[0], width / shape[1]) == 1


def crop(image: Image.Image, size: Size, left: int, top: int) -> NDArray[np.uint8]:
    """The H x W part of an RGB image at this corner, (3, H, W) uint8."""
    height, width = height_width(size)
    array = np.asarray(image)[top : top + height, left : left + width]
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def center_crop(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    """The centre after `resize_to_cover`, (3, H, W) uint8: used for caches and evaluation."""
    height, width = height_width(size)
    image = resize_to_cover(image, size)
    return crop(image, size, (image.width - width) // 2, (image.height - height) // 2)
