"""Images with label maps: index PNGs, COCO panoptic, rendered scenes; crops, pairing, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openpae.data.label_maps import read_segmented
from openpae.data.scenes import render_segmented


@pytest.fixture
def city(tmp_path: Path) -> Path:
    """Three pictures whose red channel is ten times their label; two of them below a folder."""
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a/1": (64, 48), "a/2": (40, 90), "3": (32, 32)}.items():
        label = np.kron(rng.integers(0, 4, (height // 8 + 1, width // 8 + 1)), np.ones((8, 8), int))
        label = label[:height, :width].astype(np.uint8)
        for kind, image in (
            ("images", Image.fromarray(np.stack([10 * label] * 3, axis=-1))),
            ("masks", Image.fromarray(label)),
        ):
            file = tmp_path / kind / f"{name}.{'bmp' if kind == 'images' else 'png'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return tmp_path


@pytest.mark.parametrize("size", [32, 48, 16])
def test_labels_are_cropped_as_their_images(city: Path, size: int) -> None:
    """The nearest pixels of the image's scale, then the middle; test_crops.py has uneven margins."""
    found = read_segmented(city / "images", city / "masks", size=size)
    assert found.images.shape == (3, 3, size, size)
    scaled = {
        32: [(32, 32), (43, 32), (32, 72)],
        48: [(48, 48), (64, 48), (48, 108)],
        16: [(16, 16), (21, 16), (16, 36)],
    }
    for label, name, shape in zip(found.labels, ("3", "a/1", "a/2"), scaled[size], strict=True):
        whole = np.array(Image.open(city / f"masks/{name}.png").resize(shape, Image.Resampling.NEAREST))
        left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
        assert torch.equal(label, torch.from_numpy(whole[top : top + size, left : left + size]).long()), name


def test_maps_may_lie_beside_their_images(city: Path) -> None:
    apart = read_segmented(city / "images", city / "masks", size=16)
    for file in (city / "masks").rglob("*.png"):
        file.rename(city / "images" / file.relative_to(city / "masks"))
    beside = read_segmented(city / "images", city / "images", size=16, ignore=3)
    assert torch.equal(beside.labels, apart.labels)
    assert beside.ignore == 3
    assert beside.fingerprint() != apart.fingerprint()  # what counts is part of what was measured


def test_count_spreads_over_all(city: Path) -> None:
    found = read_segmented(city / "images", city / "masks", size=16)
    two = read_segmented(city / "images", city / "masks", size=16, count=2)
    assert torch.equal(two.labels, found.labels[[0, 2]])


def test_coco_panoptic_ids_are_read_from_colours(city: Path) -> None:
    ids = np.array([[0, 7], [300, 70_000]]).repeat(16, 0).repeat(16, 1)
    folder = city / "panoptic_val"
    folder.mkdir()
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(folder / "000003.png")
    content = {
        "images": [{"id": 5, "file_name": "3.bmp"}],
        "annotations": [{"image_id": 5, "file_name": "000003.png", "segments_info": []}],
    }
    (city / "panoptic_val.json").write_text(json.dumps(content))
    found = read_segmented(city / "images", city / "panoptic_val.json", size=32)
    assert torch.equal(found.labels[0], torch.from_numpy(ids))
    assert found.ignore == 0
    with pytest.raises(ValueError, match="ignore must be left out"):
        read_segmented(city / "images", city / "panoptic_val.json", size=32, ignore=1)
    (city / "panoptic_val.json").write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="no COCO panoptic JSON: it lacks 'annotations'"):
        read_segmented(city / "images", city / "panoptic_val.json", size=32)


def test_unfit_maps_are_named(city: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no label maps in"):
        read_segmented(city / "images", city / "nothing", size=16)
    Image.new("L", (9, 9)).save(city / "masks/3.png")
    with pytest.raises(ValueError, match=r"3\.png must have the size of 3\.bmp, 32 x 32, got 9 x 9"):
        read_segmented(city / "images", city / "masks", size=16)
    Image.new("RGB", (32, 32)).save(city / "masks/3.png")
    with pytest.raises(ValueError, match=r"3.png .* one integer per pixel .* got mode RGB"):
        read_segmented(city / "images", city / "masks", size=16)
    Image.new("L", (9, 9)).save(city / "masks/4.png")
    with pytest.raises(FileNotFoundError, match=r"no image for the label map .*4\.png"):
        read_segmented(city / "images", city / "masks", size=16)


@pytest.mark.assets
def test_scenes_are_the_same_for_the_same_seed() -> None:
    scenes = render_segmented(2, size=32, seed=1)
    assert scenes.images.shape == (2, 3, 32, 32)
    assert (scenes.labels.amax(dim=(1, 2)) >= 1).all()
    assert scenes.fingerprint() == render_segmented(2, size=32, seed=1).fingerprint()
    with pytest.raises(ValueError, match="scenes must be at least 1"):
        render_segmented(0, size=32)
