"""Images on disk: read in a stable order, cropped as ADM does, and broken ones named, counted or refused."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openpae.data.crops import center_crop, resize_to_cover
from openpae.data.decode import BrokenImage, read_image
from openpae.data.images import ImageFolder, PackedImages, open_images
from openpae.data.packing import pack_images
from openpae.data.settings import ImageData
from openpae.data.training import TrainingImages, raise_on_broken
from tests.conftest import kill_points


@pytest.fixture
def spoiled(image_folder: Path, tmp_path: Path) -> Path:
    """A copy in which two of ten files are broken: one cut off, one no image at all."""
    root = Path(shutil.copytree(image_folder, tmp_path / "spoiled"))
    file = root / "boxes" / "5.png"
    file.write_bytes(file.read_bytes()[:60])
    (root / "discs" / "9.png").write_text("not an image")
    return root


def picture(width: int, height: int) -> Image.Image:
    """Every pixel tells its place."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8))


# Folders


def test_classes_and_files_come_in_the_order_of_their_names(image_folder: Path) -> None:
    source = ImageFolder(image_folder)
    assert source.classes == ["boxes", "discs"]
    assert source.labels.tolist() == [0] * 6 + [1] * 4
    assert [source.name(i) for i in (0, 5, 6)] == ["boxes/0.png", "boxes/5.png", "discs/6.png"]
    assert source.read(0).mode == "RGB"


def test_deeper_and_flat_folders_are_read(image_folder: Path, tmp_path: Path) -> None:
    flat = ImageFolder(image_folder / "boxes")
    assert (flat.classes, len(flat)) == (["all"], 6)
    deep = tmp_path / "class" / "a" / "b"
    deep.mkdir(parents=True)
    shutil.copy(image_folder / "boxes" / "0.png", deep / "0.PNG")
    shutil.copy(image_folder / "boxes" / "0.png", tmp_path / "class" / "z.png")
    os.symlink(tmp_path / "class", deep / "up")  # a link that leads in circles
    (tmp_path / "class" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    found = ImageFolder(tmp_path)
    assert [found.name(i) for i in range(len(found))] == ["class/a/b/0.PNG", "class/z.png"]


def test_folders_that_can_not_be_meant_are_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no image folder at {tmp_path / 'none'}"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no images in .*; known endings: .bmp .gif"):
        ImageFolder(tmp_path)
    copy = Path(shutil.copytree(image_folder, tmp_path / "copy"))
    (copy / "empty").mkdir()
    with pytest.raises(ValueError, match="has 1 class folders without images: empty"):
        ImageFolder(copy)
    shutil.copy(copy / "boxes" / "0.png", copy)
    with pytest.raises(ValueError, match=r"both directly and in subfolders \(boxes\)"):
        ImageFolder(copy)


def test_fingerprint_sees_names_classes_and_sizes(image_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(image_folder, tmp_path / "copy"))
    first = ImageFolder(image_folder).fingerprint()
    assert ImageFolder(copy).fingerprint() == first
    prints = {first}
    (copy / "boxes" / "5.png").rename(copy / "discs" / "5.png")
    prints.add(ImageFolder(copy).fingerprint())
    with (copy / "discs" / "5.png").open("ab") as file:
        file.write(b"x")
    prints.add(ImageFolder(copy).fingerprint())
    (copy / "discs" / "5.png").unlink()
    prints.add(ImageFolder(copy).fingerprint())
    assert len(prints) == 4


def test_names_that_are_not_utf8_are_taken(image_folder: Path, tmp_path: Path) -> None:
    """Linux allows any bytes; old archives have them."""
    shutil.copy(image_folder / "boxes" / "0.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    source = ImageFolder(tmp_path)
    assert [len(part) for part in source.fingerprint().split(".")] == [16, 16]
    assert len(pack_images(source, tmp_path / "packed", size=16)) == 1


# Files


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    endings = {"CMYK": "jpg"}
    file = tmp_path / f"image.{endings.get(mode, 'png')}"
    base = Image.new("L", (8, 8), 100)
    (Image.new("I;16", (8, 8), 100) if mode == "I;16" else base.convert(mode)).save(file)
    image = read_image(file)
    assert (image.mode, image.size) == ("RGB", (8, 8))


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # a damaged header may claim any size
@settings(max_examples=30)
@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    cut=st.floats(0, 1),
)
def test_damaged_files_give_an_image_or_one_error_that_names_them(
    damage: list[tuple[float, int]], cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for ending in ("png", "jpg", "webp"):
        file = tmp_path_factory.getbasetemp() / f"damaged.{ending}"
        picture(24, 16).save(file)
        content = bytearray(file.read_bytes())
        for place, value in damage:
            content[int(place * min(len(content), 100))] = value  # headers are where readers stumble
        file.write_bytes(content[: int(cut * len(content))])
        message = f"damaged.{ending} cannot be decoded: "
        try:
            assert read_image(file).mode == "RGB"
        except BrokenImage as error:
            message = str(error)
        assert f"damaged.{ending} cannot be decoded: " in message


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenImage, match=r"gone.png cannot be decoded: .*No such file"):
        read_image(tmp_path / "gone.png")


# Crops


@given(width=st.integers(1, 150), height=st.integers(1, 150), size=st.integers(1, 40))
def test_the_shorter_side_is_what_was_asked_for(width: int, height: int, size: int) -> None:
    resized = resize_to_cover(Image.new("RGB", (width, height)), size)
    assert min(resized.size) == size
    assert center_crop(Image.new("RGB", (width, height)), size).shape == (3, size, size)
    if max(width, height) < 4 * min(width, height):
        assert max(resized.size) / size == pytest.approx(
            max(width, height) / min(width, height), abs=1.6 / size + 0.1
        )


def test_the_middle_is_cut_out_and_a_fitting_image_is_left_alone() -> None:
    cut = center_crop(picture(30, 20), 20)
    assert cut[0, 0].tolist() == list(range(5, 25))
    assert cut[1, :, 0].tolist() == list(range(20))
    whole = picture(16, 16)
    assert (center_crop(whole, 16) == np.asarray(whole).transpose(2, 0, 1)).all()


def test_large_images_are_halved_by_boxes_first() -> None:
    """As ADM does: a box average of 2 x 2 before the bicubic step, so that fine checks become grey."""
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(checks[..., None], 3, axis=-1).astype(np.uint8))
    assert np.abs(center_crop(image, 16).astype(int) - 128).max() <= 1


# Packed


def test_packed_images_are_the_centre_crops(image_folder: Path, packed: PackedImages) -> None:
    source = ImageFolder(image_folder)
    assert isinstance(open_images(packed.shards.folder), PackedImages)
    assert isinstance(open_images(image_folder), ImageFolder)
    assert (packed.classes, packed.image_shape, len(packed)) == (source.classes, (32, 32), 10)
    assert (packed.labels == source.labels).all()
    for i in range(10):
        expected = center_crop(source.read(i), 32)
        assert (packed.shards.gather(np.array([i]))[0].numpy() == expected).all()
        assert (np.asarray(packed.read(i)).transpose(2, 0, 1) == expected).all()
    assert packed.name(3) == f"{packed.shards.folder}[3]"


def test_packing_killed_anywhere_goes_on_to_the_same_images(
    packed: PackedImages, image_folder: Path, tmp_path: Path
) -> None:
    source, folder = ImageFolder(image_folder), tmp_path / "packed"
    deaths = 0
    for survived in kill_points(lambda: pack_images(source, folder, size=32, per_shard=4), folder):
        if survived % 5 == 0:  # every fifth, as the shards are tested at each
            assert pack_images(source, folder, size=32, per_shard=4).fingerprint() == packed.fingerprint()
        shutil.rmtree(folder, ignore_errors=True)
        deaths += 1
    assert deaths > 10


def test_a_folder_that_changed_is_not_packed_on(image_folder: Path, tmp_path: Path) -> None:
    pack_images(ImageFolder(image_folder), tmp_path / "packed", size=32)
    copy = Path(shutil.copytree(image_folder, tmp_path / "copy"))
    (copy / "boxes" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"begun with another .*source .*, sources \(10 there, 9 now\)"):
        pack_images(ImageFolder(copy), tmp_path / "packed", size=32)
    with pytest.raises(ValueError, match=r"begun with another .*shape"):
        pack_images(ImageFolder(image_folder), tmp_path / "packed", size=16)


def test_packing_stops_at_a_broken_file_and_says_what_to_do(spoiled: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenImage, match=r"5.png cannot be decoded.*remove the file, or pass --skip-broken"):
        pack_images(ImageFolder(spoiled), tmp_path / "packed", size=32)


def test_packing_without_broken_files_names_and_counts_them(
    spoiled: Path, packed: PackedImages, tmp_path: Path
) -> None:
    kept = pack_images(ImageFolder(spoiled), tmp_path / "packed", size=32, per_shard=4, skip_broken=True)
    assert len(kept) == 8
    first, second = kept.shards.index["skipped"]
    assert "boxes/5.png cannot be decoded" in first
    assert "discs/9.png cannot be decoded: no known image format" in second
    rows = np.array([0, 1, 2, 3, 4, 6, 7, 8])
    assert torch.equal(kept.shards.gather(np.arange(8)), packed.shards.gather(rows))
    assert (kept.labels == packed.labels[rows]).all()


# Training


def test_training_images_are_a_function_of_position(packed: PackedImages, image_folder: Path) -> None:
    """In any batch, from packed or plain files, the image of a position is the same."""
    positions = list(range(7, 31))  # over the borders of three epochs
    for augment, source in (("flip", packed), ("crop", packed), ("crop", ImageFolder(image_folder))):
        images = TrainingImages(source, size=32, seed=3, augment=augment, resize=40)  # type: ignore[arg-type]
        whole = images.__getitems__(positions)
        for start in range(0, 24, 5):
            part = images.__getitems__(positions[start : start + 5])
            assert torch.equal(part.images, whole.images[start : start + 5])
            assert torch.equal(part.labels, whole.labels[start : start + 5])
        again = TrainingImages(source, size=32, seed=4, augment=augment, resize=40).__getitems__(positions)  # type: ignore[arg-type]
        assert not torch.equal(again.images, whole.images)


def test_packed_and_plain_files_give_the_same_training_images(
    packed: PackedImages, image_folder: Path
) -> None:
    for augment in ("none", "flip"):
        a, b = (
            TrainingImages(source, size=32, seed=1, augment=augment).__getitems__(list(range(20)))  # type: ignore[arg-type]
            for source in (packed, ImageFolder(image_folder))
        )
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_an_epoch_sees_every_image_and_half_of_them_mirrored(packed: PackedImages) -> None:
    plain = packed.shards.gather(np.arange(10))
    found, mirrored = [], 0
    images = TrainingImages(packed, size=32, seed=0, augment="flip").__getitems__(list(range(200)))
    for image, label in zip(images.images, images.labels, strict=True):
        same = [(image == plain[i]).all() or (image.flip(-1) == plain[i]).all() for i in range(10)]
        index = same.index(True)
        assert packed.labels[index] == label
        found.append(index)
        mirrored += not bool((image == plain[index]).all())
    assert all(sorted(found[start : start + 10]) == list(range(10)) for start in range(0, 200, 10))
    assert 70 < mirrored < 130


def test_random_crops_reach_every_place_and_stay_inside(tmp_path: Path) -> None:
    picture(40, 20).save(tmp_path / "a.png")
    images = TrainingImages(ImageFolder(tmp_path), size=16, seed=0, augment="crop", resize=20)
    batch = images.__getitems__(list(range(1500))).images
    left, top = batch[:, 0].amin((1, 2)).tolist(), batch[:, 1].amin((1, 2)).tolist()
    steps = batch[:, 0, 0].int().diff(dim=1)
    assert set(steps.flatten().tolist()) == {-1, 1}
    mirrored = steps[:, 0].tolist()
    assert set(zip(left, top, strict=True)) == set(itertools.product(range(25), range(5)))
    assert len(set(zip(left, mirrored, strict=True))) == 50
    assert 650 < mirrored.count(-1) < 850


def test_training_stops_at_a_broken_file_and_says_what_to_do(spoiled: Path) -> None:
    images = TrainingImages(ImageFolder(spoiled), size=32, seed=0)
    with pytest.raises(BrokenImage, match=r"cannot be decoded.*or pass --data.skip-broken"):
        list(raise_on_broken([images.__getitems__(list(range(10)))]))


def test_training_puts_the_next_image_in_the_place_of_a_broken_one(
    spoiled: Path, packed: PackedImages
) -> None:
    skipping = TrainingImages(ImageFolder(spoiled), size=32, seed=0, skip_broken=True)
    batch = skipping.__getitems__(list(range(10)))
    assert sorted(text.split(" cannot")[0][-11:] for text in batch.skipped) == ["boxes/5.png", "discs/9.png"]
    whole = TrainingImages(packed, size=32, seed=0).__getitems__(list(range(10)))
    plain = packed.shards.gather(np.arange(10))
    for got, wanted, label in zip(batch.images, whole.images, batch.labels, strict=True):
        index = next(i for i in range(10) if torch.equal(plain[i], wanted))
        index = {5: 6, 9: 0}.get(index, index)  # of another class both times
        assert torch.equal(got, plain[index])
        assert label == packed.labels[index]


def test_a_folder_of_broken_files_is_an_error_even_when_they_are_skipped(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("no image")
    images = TrainingImages(ImageFolder(tmp_path), size=32, seed=0, skip_broken=True)
    with pytest.raises(BrokenImage, match=r"not one of the 3 images can be decoded; the last: .*png"):
        list(raise_on_broken([images.__getitems__([0])]))


def test_settings_that_can_not_be_are_named(packed: PackedImages) -> None:
    with pytest.raises(ValueError, match="augment 'crop' needs resize >= 32, got 16"):
        TrainingImages(packed, size=32, seed=0, augment="crop", resize=16)
    with pytest.raises(ValueError, match=r"feature_cache needs data.augment none or flip"):
        ImageData(images=Path("x"), feature_cache=Path("y"), augment="crop")
    with pytest.raises(ValueError, match="evaluation_images must be >= 1, got 0"):
        ImageData(images=Path("x"), evaluation_images=0)
