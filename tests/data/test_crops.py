"""Which pixels a centre crop takes, to the pixel, of images and of their label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openpae.data.crops import center_crop
from openpae.data.label_maps import read_segmented

CASES = [
    ((35, 20), (20, 20), (0, 7)),
    ((20, 35), (20, 20), (7, 0)),
    ((36, 20), (20, 20), (0, 8)),
    ((33, 20), (20, 24), (0, 4)),
    ((24, 33), (20, 24), (6, 0)),
]
"""Width and height, height and width of the crop, and its first row and column as ADM has them:
(height - size) // 2 and (width - size) // 2."""


def where(width: int, height: int) -> np.ndarray:
    """An image whose red is the column and whose green is the row: (height, width, 3)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("size", "shape", "first"), CASES)
def test_an_uneven_margin_is_rounded_as_adm_does(
    size: tuple[int, int], shape: tuple[int, int], first: tuple[int, int]
) -> None:
    pixels = center_crop(Image.fromarray(where(*size)), shape)
    assert pixels.shape == (3, *shape)
    assert pixels[1, :, 0].tolist() == list(range(first[0], first[0] + shape[0]))
    assert pixels[0, 0].tolist() == list(range(first[1], first[1] + shape[1]))


@pytest.mark.parametrize(("size", "shape", "first"), CASES)
@pytest.mark.parametrize("channel", [0, 1])
def test_a_label_map_is_cropped_at_the_pixels_of_its_image(
    size: tuple[int, int], shape: tuple[int, int], first: tuple[int, int], channel: int, tmp_path: Path
) -> None:
    """The map holds what the image holds in one channel, and still does after the crop."""
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    Image.fromarray(where(*size)).save(tmp_path / "images" / "a.png")
    Image.fromarray(where(*size)[..., channel]).save(tmp_path / "maps" / "a.png")
    found = read_segmented(tmp_path / "images", tmp_path / "maps", size=shape)
    assert torch.equal(found.images[:, channel].long(), found.labels)
    assert found.labels[0, 0, 0] == first[1 - channel]


def test_a_scaled_label_map_has_the_nearest_pixels_of_the_same_crop(tmp_path: Path) -> None:
    """Of 90 x 64 at 32, halved once by boxes: 45 x 32, then columns 6 to 37."""
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    label = np.random.default_rng(0).integers(0, 200, (64, 90), dtype=np.uint8)
    Image.fromarray(np.stack([label] * 3, axis=-1)).save(tmp_path / "images" / "a.png")
    Image.fromarray(label).save(tmp_path / "maps" / "a.png")
    found = read_segmented(tmp_path / "images", tmp_path / "maps", size=32)
    assert torch.equal(found.labels[0], torch.from_numpy(label[1::2, 1::2][:, 6:38]).long())
