"""Arrays of pixels in npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpae.data.arrays import open_npz
from openpae.data.images import open_images

PIXELS = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_names_of_other_writers_are_known(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    path = saved(tmp_path / "a.npz", arr_0=PIXELS, arr_1=np.array([0, 1, 0, 1, 4]))
    source = open_images(path)
    assert source.classes == ["0", "1", "2", "3", "4"]
    assert np.array_equal(np.asarray(source.read(3)), PIXELS[3])
    path = saved(tmp_path / "b.npz", val_images=grey, val_labels=np.array([[0], [1], [0], [1], [0]]))
    source = open_images(f"{path}#val")
    assert source.labels.tolist() == [0, 1, 0, 1, 0]
    assert np.array_equal(np.asarray(source.read(2)), np.repeat(grey[2, ..., None], 3, axis=-1))
    assert open_npz(saved(tmp_path / "c.npz", images=PIXELS)).classes == ["all"]
    assert open_npz(saved(tmp_path / "d.npz", x=PIXELS, y=np.array([*"babab"]))).classes == ["a", "b"]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": PIXELS / 255}, r"must be uint8 images \(N, H, W, 3\) or \(N, H, W\), got float64"),
        ({"images": PIXELS.transpose(0, 3, 1, 2)}, r"got uint8 \(5, 3, 4, 6\)"),
        ({"images": np.asfortranarray(PIXELS)}, "must be uint8 images"),
        ({"pixels": PIXELS}, "holds no images; it holds: pixels"),
        ({"images": PIXELS, "labels": np.arange(4)}, r"labels in .* must hold 5 labels, got \(4,\)"),
        ({"images": PIXELS[:4], "labels": np.eye(2, dtype=int)}, r"must hold 4 labels, got \(2, 2\)"),
        ({"images": PIXELS, "labels": np.ones(5) / 2}, "labels must hold"),
        ({"images": PIXELS, "labels": -np.arange(5)}, "has the label -1"),
        ({"images": PIXELS, "labels": np.arange(5), "classes": np.array(["a"])}, "labels must be 0 to 0"),
        ({"images": PIXELS, "labels": np.array([{}] * 5)}, "is damaged: labels claims"),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        open_npz(saved(tmp_path / "a.npz", **arrays))
    with pytest.raises(FileNotFoundError, match="no images in"):
        open_npz(saved(tmp_path / "a.npz", images=PIXELS[:0]))


def test_a_compressed_array_is_read_in_order_and_again(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=PIXELS)
    source = open_npz(tmp_path / "a.npz")
    assert not source.at_random
    for index in (0, 2, 1, 4, 3, 0):  # threads overtake each other a little, and a resumed pack starts later
        assert np.array_equal(np.asarray(source.read(index)), PIXELS[index])
