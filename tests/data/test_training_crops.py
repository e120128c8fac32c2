"""Training images cut straight from the memory map are those that go through Pillow, to the bit."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from openpae.data.images import ImageFolder, PackedImages, Subset
from openpae.data.packing import pack_images
from openpae.data.training import TrainingImages


@pytest.fixture(scope="module")
def packed(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    """Ten images of 24 x 32 pixels, in three shards."""
    folder = tmp_path_factory.mktemp("packed") / "images"
    return pack_images(ImageFolder(image_folder), folder, size=(24, 32), per_shard=4)


@pytest.mark.parametrize(
    ("augment", "size", "resize"),
    [
        ("crop", (16, 16), 24),  # one side of the images fits, the other is longer
        ("crop", (18, 24), 24),  # both fit
        ("crop", (24, 32), 24),  # nothing is cut
        ("flip", (24, 20), None),
        ("none", (24, 32), None),
    ],
)
def test_map_and_pillow_give_the_same_images(
    packed: PackedImages, augment: Literal["none", "flip", "crop"], size: tuple[int, int], resize: int | None
) -> None:
    by_pillow = Subset(packed, range(len(packed)))  # the same images, but no map
    batches = []
    for source in (packed, by_pillow):
        images = TrainingImages(source, size=size, seed=3, augment=augment, resize=resize)
        batches.append(images.__getitems__(list(range(40))))
    assert torch.equal(batches[0].images, batches[1].images)
    assert torch.equal(batches[0].labels, batches[1].labels)


def test_the_map_is_not_read_through_pillow(packed: PackedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PackedImages, "read")
    images = TrainingImages(packed, size=16, seed=0, augment="crop", resize=24)
    assert images.__getitems__([0, 1, 2]).images.shape == (3, 3, 16, 16)


def test_images_of_another_size_are_resized(packed: PackedImages) -> None:
    images = TrainingImages(packed, size=16, seed=0, augment="crop", resize=20)
    assert images.__getitems__([0, 1, 2]).images.shape == (3, 3, 16, 16)
