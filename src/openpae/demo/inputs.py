"""Pictures that the demo starts with, and pictures that a visitor gives."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from openpae.data.colour import to_srgb
from openpae.data.crops import Size, center_crop
from openpae.data.decode import MAX_ASPECT, read_image
from openpae.data.pixels import to_unit


def as_pixels(picture: str | Path | Image.Image | None, size: Size) -> Tensor:
    """A picture as the tokenizer reads it: upright, sRGB, on white, centre-cropped; (3, H, W) in [0, 1].

    Args:
        picture: an image file, or a drawing; None is an empty field of the page.
        size: (H, W) in pixels, or the side of a square.

    Raises:
        ValueError: there is no picture, the file cannot be decoded, or its sides are too unequal.
    """
    if picture is None:
        raise ValueError("there is no picture: choose a file or draw one")
    if isinstance(picture, Image.Image):
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            raise ValueError(
                f"the sides of the drawing are more than {MAX_ASPECT} to 1; draw on a new canvas"
            )
        image = to_srgb(picture)[0]
    else:
        image = read_image(Path(picture))
    return to_unit(torch.from_numpy(center_crop(image, size)))


def drawn_face(side: int = 256) -> Image.Image:
    """A smiling face: the first picture of the page."""
    image = Image.new("RGB", (side, side), "#cfe8ee")
    draw = ImageDraw.Draw(image)
    line = max(1, side // 24)

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return (left * side, top * side, right * side, bottom * side)

    draw.ellipse(box(0.12, 0.12, 0.88, 0.88), fill="#fcea2b", outline="black", width=line)
    for left in (0.33, 0.58):
        draw.ellipse(box(left, 0.36, left + 0.09, 0.48), fill="black")
    draw.arc(box(0.3, 0.36, 0.7, 0.72), 20, 160, fill="black", width=line)
    return image


def drawn_house(side: int = 256) -> Image.Image:
    """A house: the second picture of the page."""
    image = Image.new("RGB", (side, side), "#f3e3d3")
    draw = ImageDraw.Draw(image)
    line = max(1, side // 24)
    draw.rectangle([0.22 * side, 0.45 * side, 0.78 * side, 0.86 * side], "#92d3f5", "black", line)
    roof = [(0.1 * side, 0.48 * side), (0.5 * side, 0.12 * side), (0.9 * side, 0.48 * side)]
    draw.polygon(roof, fill="#ea5a47", outline="black", width=line)
    draw.rectangle([0.42 * side, 0.6 * side, 0.58 * side, 0.86 * side], "#a57939", "black", line)
    return image
