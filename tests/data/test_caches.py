"""Caches hold what the networks give, mirror images too, and belong to one network and one data set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openpae.data.caches import cache_features, cache_latents, cache_latents_of_features
from openpae.data.decode import BrokenImage
from openpae.data.images import ImageFolder, PackedImages
from openpae.data.packing import pack_images
from openpae.data.shards import Shards
from openpae.data.training import TrainingImages, TrainingLatents
from openpae.models.saved import load_tokenizer
from openpae.models.tokenizer import PAE
from openpae.storage.model_folder import identity_of


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path) -> PAE:
    return load_tokenizer(tokenizer_folder)


class Killed(BaseException):
    """Not an Exception, so that nothing in the way may catch it."""


def fill(model: PAE, source: Any, folder: Path, *, calls: int | None = None, **changes: Any) -> Shards:
    """Cache latents; with `calls`, the encoder dies at that call."""
    left = calls

    def encode(x: Tensor) -> Tensor:
        nonlocal left
        if left is not None:
            left -= 1
            if left < 0:
                raise Killed
        return model.encode(x)

    settings = {
        "image_size": 32,
        "latent_shape": model.config.latent_shape,
        "tokenizer_fingerprint": "print",
        "batch_size": 2,
        "per_shard": 4,
    }
    return cache_latents(encode, source, folder, **(settings | changes))


def features_of(model: PAE, packed: PackedImages, folder: Path, **changes: Any) -> Shards:
    settings = {
        "image_size": 32,
        "shape": (16, 48),
        "encoder_fingerprint": "e",
        "flips": True,
        "batch_size": 4,
    }
    return cache_features(model.features, packed, folder, **(settings | changes))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def test_latents_are_those_of_the_images_and_of_their_mirror_images(
    model: PAE, packed: PackedImages, latents: Shards, tokenizer_folder: Path
) -> None:
    x = packed.shards.gather(np.arange(10)).float() / 255
    stored = latents.gather(np.arange(10))
    assert stored.shape == (10, 2, 8, 4, 4)
    for version, images in enumerate((x, x.flip(-1))):
        expected = torch.cat([model.encode(part) for part in images.split(2)])
        assert torch.equal(stored[:, version], expected.bfloat16())
        assert torch.equal(latents.gather(np.arange(10), np.full(10, version)), expected.bfloat16())
    assert (stored[:, 0] - stored[:, 1].flip(-1)).abs().max() > 0.01  # a mirrored latent would not do
    assert (latents.labels == packed.labels).all()
    assert latents.attributes["classes"] == packed.classes
    assert latents.attributes["tokenizer"] == identity_of(tokenizer_folder).fingerprint


def test_statistics_are_numpys_over_everything_stored(latents: Shards) -> None:
    stored = latents.gather(np.arange(10)).double().numpy()
    np.testing.assert_allclose(latents.index["mean"], stored.mean((0, 1, 3, 4)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(latents.index["std"], stored.std((0, 1, 3, 4)), rtol=1e-9)


@pytest.mark.parametrize("calls", [0, 1, 3, 4, 5, 7, 9])
def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(
    model: PAE, packed: PackedImages, tmp_path: Path, calls: int
) -> None:
    with pytest.raises(Killed):
        fill(model, packed, tmp_path / "resumed", calls=calls)
    assert not (tmp_path / "resumed" / "index.json").exists()
    fill(model, packed, tmp_path / "resumed")
    fill(model, packed, tmp_path / "whole")
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")


def test_a_complete_cache_computes_nothing_again(model: PAE, packed: PackedImages, tmp_path: Path) -> None:
    first = fill(model, packed, tmp_path / "cache")
    assert fill(model, packed, tmp_path / "cache", calls=0).fingerprint() == first.fingerprint()


def test_a_plain_folder_gives_the_latents_of_its_packed_form(
    model: PAE, packed: PackedImages, image_folder: Path, tmp_path: Path
) -> None:
    plain = fill(model, ImageFolder(image_folder), tmp_path / "plain")
    assert plain.fingerprint() == fill(model, packed, tmp_path / "packed").fingerprint()


def test_shards_hold_whole_batches(model: PAE, packed: PackedImages, tmp_path: Path) -> None:
    """So that a resumed run makes the same passes as an uninterrupted one."""
    shards = fill(model, packed, tmp_path / "cache", batch_size=3, per_shard=4)
    assert shards.index["rows"] == [6, 4]


def test_without_flips_there_is_one_version(model: PAE, packed: PackedImages, tmp_path: Path) -> None:
    shards = fill(model, packed, tmp_path / "cache", flips=False)
    assert shards.shape == (1, 8, 4, 4)
    batch = TrainingLatents(shards, seed=0).__getitems__(list(range(5)))
    assert batch.latents.shape == (5, 8, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_fingerprint": "other"}, r"attributes.tokenizer \(print there, other now\)"),
        ({"precision": "bf16"}, r"attributes.precision \(fp32 there, bf16 now\)"),
        ({"flips": False}, r"shape \(\[2, 8, 4, 4\] there, \[1, 8, 4, 4\] now\)"),
        ({"image_size": 64}, r"attributes.image_size \(32 there, 64 now\)"),
    ],
)
def test_another_tokenizer_is_refused(
    model: PAE, packed: PackedImages, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fill(model, packed, tmp_path / "cache")
    with pytest.raises(ValueError, match=f"begun with another {message}"):
        fill(model, packed, tmp_path / "cache", **changes)


def test_other_images_are_refused(
    model: PAE, packed: PackedImages, image_folder: Path, tmp_path: Path
) -> None:
    fill(model, packed, tmp_path / "cache")
    copy = Path(shutil.copytree(image_folder, tmp_path / "copy"))
    (copy / "boxes" / "5.png").rename(copy / "discs" / "5.png")  # same images in the same order, other labels
    relabelled = pack_images(ImageFolder(copy), tmp_path / "packed", size=32, per_shard=4)
    with pytest.raises(ValueError, match=r"begun with another attributes.images"):
        fill(model, relabelled, tmp_path / "cache")


def test_broken_files_are_refused_or_named(model: PAE, image_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(image_folder, tmp_path / "copy"))
    for name in ("boxes/0.png", "boxes/1.png", "discs/8.png"):  # the first two are a whole batch
        (copy / name).write_text("no image")
    with pytest.raises(BrokenImage, match=r"0.png cannot be decoded.*or pass --skip-broken"):
        fill(model, ImageFolder(copy), tmp_path / "cache")
    shards = fill(model, ImageFolder(copy), tmp_path / "cache", skip_broken=True)
    assert len(shards) == 7
    assert [text.split(" cannot")[0][-11:] for text in shards.index["skipped"]] == [
        "boxes/0.png",
        "boxes/1.png",
        "discs/8.png",
    ]
    assert shards.labels.tolist() == [0] * 4 + [1] * 3


def test_a_tokenizer_that_has_diverged_is_not_cached(packed: PackedImages, tmp_path: Path) -> None:
    def encode(x: Tensor) -> Tensor:
        return torch.full((len(x), 8, 4, 4), torch.nan)

    with pytest.raises(ValueError, match="not finite in bfloat16; the network that made them has diverged"):
        cache_latents(
            encode, packed, tmp_path / "c", image_size=32, latent_shape=(8, 4, 4), tokenizer_fingerprint="p"
        )


def test_progress_ends_at_the_number_of_images(model: PAE, packed: PackedImages, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    fill(model, packed, tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 10) for done in (2, 4, 6, 8, 10)]


# Training on caches


def test_training_latents_are_a_function_of_position(latents: Shards) -> None:
    data, positions = TrainingLatents(latents, seed=2), list(range(3, 43))
    whole = data.__getitems__(positions)
    for start in range(0, 40, 7):
        part = data.__getitems__(positions[start : start + 7])
        assert torch.equal(part.latents, whole.latents[start : start + 7])
        assert torch.equal(part.labels, whole.labels[start : start + 7])


def test_training_latents_are_mirrored_by_half_and_keep_their_labels(latents: Shards) -> None:
    stored, versions, rows = latents.gather(np.arange(10)), [], []
    batch = TrainingLatents(latents, seed=0).__getitems__(list(range(200)))
    for z, label in zip(batch.latents, batch.labels, strict=True):
        row, version = next((r, v) for r in range(10) for v in range(2) if torch.equal(stored[r, v], z))
        assert latents.labels[row] == label
        rows.append(row)
        versions.append(version)
    assert all(sorted(rows[start : start + 10]) == list(range(10)) for start in range(0, 200, 10))
    assert 70 < sum(versions) < 130


@torch.no_grad()
@pytest.mark.parametrize("augment", ["none", "flip"])
def test_cached_features_are_the_computed_ones_of_the_same_image(
    model: PAE, packed: PackedImages, tmp_path: Path, augment: Any
) -> None:
    """Mirrored images must come with the features of mirrored images, row by row."""
    features = features_of(model, packed, tmp_path / "features", flips=augment == "flip")
    data = TrainingImages(packed, size=32, seed=5, augment=augment, features=features)
    batch = data.__getitems__(list(range(24)))
    assert batch.features is not None
    expected = model.features(batch.images.float() / 255)
    torch.testing.assert_close(batch.features.float(), expected, atol=5e-3, rtol=1e-3)
    plain = TrainingImages(packed, size=32, seed=5, augment=augment).__getitems__(list(range(24)))
    assert torch.equal(plain.images, batch.images)


def test_latents_of_cached_features_are_those_of_the_whole_tokenizer(
    model: PAE, packed: PackedImages, latents: Shards, tmp_path: Path
) -> None:
    """Up to the float16 of the features and the bfloat16 of the latents; labels and statistics too."""
    facts: dict[str, Any] = {"latent_shape": model.config.latent_shape, "tokenizer_fingerprint": "t"}
    features = features_of(model, packed, tmp_path / "features")
    quick = cache_latents_of_features(
        model.encode, packed, features, tmp_path / "latents", batch_size=3, per_shard=4, **facts
    )
    rows = np.arange(len(packed))
    torch.testing.assert_close(quick.gather(rows).float(), latents.gather(rows).float(), atol=0.02, rtol=0.02)
    np.testing.assert_array_equal(quick.labels, latents.labels)
    assert quick.attributes["image_size"] == 32
    bare = features_of(model, packed, tmp_path / "bare", flips=False)
    once = cache_latents_of_features(model.encode, packed, bare, tmp_path / "once", flips=False, **facts)
    torch.testing.assert_close(once.gather(rows)[:, 0], quick.gather(rows)[:, 0], atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="and of their mirror images"):
        cache_latents_of_features(model.encode, packed, bare, tmp_path / "more", **facts)


def test_cached_features_must_fit_images_encoder_and_augmentation(
    model: PAE, packed: PackedImages, image_folder: Path, tmp_path: Path
) -> None:
    features = features_of(model, packed, tmp_path / "one", flips=False)
    with pytest.raises(ValueError, match="lack the mirrored images; cache them with flips"):
        TrainingImages(packed, size=32, seed=0, augment="flip", features=features)
    with pytest.raises(ValueError, match="do not fit random crops"):
        TrainingImages(packed, size=32, seed=0, augment="crop", resize=40, features=features)
    with pytest.raises(ValueError, match="need packed images"):
        TrainingImages(ImageFolder(image_folder), size=32, seed=0, features=features)
    other = pack_images(ImageFolder(image_folder / "boxes"), tmp_path / "other", size=32)
    with pytest.raises(ValueError, match=r"the features in .*one are not those of the images in .*other"):
        TrainingImages(other, size=32, seed=0, features=features)
    with pytest.raises(ValueError, match=r"begun with another attributes.encoder \(e there, f now\)"):
        features_of(model, packed, tmp_path / "one", flips=False, encoder_fingerprint="f")
