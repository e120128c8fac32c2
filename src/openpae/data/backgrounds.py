"""Soft backgrounds for rendered pictures: one colour, or a gradient between two similar ones."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def soft_background(rng: np.random.Generator, size: int) -> Image.Image:
    """One soft colour or, half of the time, a gradient between two similar ones: RGB, (size, size)."""
    hue, lightness, chroma = rng.uniform(0, 2 * math.pi), rng.uniform(0.84, 0.95), rng.uniform(0.03, 0.085)
    turn, lift = rng.uniform(-0.9, 0.9), rng.uniform(-0.06, 0.03)
    direction = rng.uniform(0, 2 * math.pi)
    if rng.random() < 0.5:
        return Image.new("RGB", (size, size), tuple(oklch_to_rgb(lightness, chroma, np.array(hue)).tolist()))
    along = np.linspace(-0.5, 0.5, size)
    x, y = math.cos(direction) * along[None, :], math.sin(direction) * along[:, None]
    ramp = (x + y) / (abs(math.cos(direction)) + abs(math.sin(direction))) + 0.5  # 0 to 1, corner to corner
    return Image.fromarray(oklch_to_rgb(lightness + lift * ramp, chroma, hue + turn * ramp))


def oklch_to_rgb(
    lightness: float | NDArray[np.float64], chroma: float, hue: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Oklab lightness, chroma and hue (radians) to sRGB bytes, (..., 3).

    Equal values look equally light and strong, unlike in HSV. Matrices: B. Ottosson, "A perceptual color
    space for image processing" (2020).
    """
    lab = np.stack([lightness + 0 * hue, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    to_lms = np.array(
        [
            [1.0, 0.3963377774, 0.2158037573],
            [1.0, -0.1055613458, -0.0638541728],
            [1.0, -0.0894841775, -1.2914855480],
        ]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_lms.T) ** 3 @ to_linear.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    rgb: NDArray[np.uint8] = np.round(255 * encoded).astype(np.uint8)
    return rgb
