"""Streams of images: their contents, batches and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from openpae.data.crops import center_crop
from openpae.data.decode import BrokenImage
from openpae.data.images import ImageFolder, PackedImages
from openpae.eval.image_stream import (
    ImageStream,
    npz_stream,
    real_images,
    sampled_images,
    source_batches,
    stored_images,
    tensor_images,
)
from openpae.models.dit import LightningDiT
from openpae.models.tokenizer import PAE
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.sampling.settings import SamplerConfig


def all_images(stream: ImageStream, batch_size: int) -> Tensor:
    """All images of a stream in the order of their numbers; each number occurs once."""
    batches = list(stream.batches(batch_size))
    assert all(1 <= len(batch.images) == len(batch.numbers) <= batch_size for batch in batches)
    numbers = [number for batch in batches for number in batch.numbers]
    assert sorted(numbers) == list(range(stream.count))
    images = torch.cat([batch.images for batch in batches])[torch.tensor(numbers).argsort()]
    assert (images.shape[-2], images.shape[-1]) == stream.size
    return images


@pytest.fixture
def levels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_its_images(levels: np.ndarray, tmp_path: Path, batch_size: int, save: object) -> None:
    save(tmp_path / "samples.npz", levels, np.arange(7))  # type: ignore[operator]
    stream = stored_images(tmp_path / "samples.npz")
    assert (stream.count, stream.size, stream.preprocessing, dict(stream.facts)) == (
        7,
        (6, 8),
        "as stored",
        {},
    )
    expected = torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(all_images(stream, batch_size), expected)
    assert torch.equal(all_images(npz_stream(tmp_path / "samples.npz", count=4), batch_size), expected[:4])


def test_a_folder_gives_its_images_and_refuses_other_sizes(levels: np.ndarray, tmp_path: Path) -> None:
    for number, pixels in enumerate(levels):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    stream = stored_images(tmp_path)
    assert torch.equal(all_images(stream, 3), torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255)
    Image.new("RGB", (9, 6)).save(tmp_path / "grid.png")
    with pytest.raises(ValueError, match=r"got 9 x 6 in .*grid\.png after 8 x 6 in .*0\.png"):
        all_images(stored_images(tmp_path), 50)
    np.savez(tmp_path / "samples.npz", levels[:2])  # as pae sample leaves it
    assert stored_images(tmp_path).count == 2


def test_a_folder_of_pae_sample_gives_its_images_and_its_record(levels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(levels):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:06d}.png")
    (tmp_path / "samples.json").write_text('{"nfe": 30}')
    Image.new("RGB", (50, 50)).save(tmp_path / "grid.png")
    for folder in (tmp_path, tmp_path / "images"):
        stream = stored_images(folder)
        assert (stream.count, stream.facts) == (7, {"nfe": 30})


def test_the_record_beside_an_npz_gives_the_facts(levels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", levels)
    (tmp_path / "samples.json").write_text('{"nfe": 30, "tokenizer": "abc"}')
    assert stored_images(tmp_path).facts == {"nfe": 30, "tokenizer": "abc"}


def test_real_images_are_cropped_and_numbered(image_folder: Path) -> None:
    source = ImageFolder(image_folder)
    stream = real_images(source, 24, name="drawn", rows=[8, 1, 5])
    expected = [torch.from_numpy(center_crop(source.read(i), 24)).float() / 255 for i in (8, 1, 5)]
    assert torch.equal(all_images(stream, 2), torch.stack(expected))
    assert (stream.name, stream.count, stream.size) == ("drawn", 3, (24, 24))
    assert "centre crop to 24 x 24" in stream.preprocessing
    assert stream.facts["data"] == source.fingerprint()


def test_tensors_are_streamed_unchanged() -> None:
    images = torch.rand(5, 3, 4, 6)
    assert torch.equal(all_images(tensor_images(images), 2), images)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        tensor_images(images * 255)


def test_sampled_images_are_those_of_sample_images(tiny_pae: PAE, tiny_dit: LightningDiT) -> None:
    config, labels = SamplerConfig(steps=3, guidance=1.5), balanced_labels(5, 2)
    stream = sampled_images(tiny_pae, tiny_dit, labels, config, size=32, seed=4, facts={"labels": "balanced"})
    expected = torch.cat(list(sample_images(tiny_pae, tiny_dit, labels, config, seed=4, batch_size=5)))
    torch.testing.assert_close(all_images(stream, 2), expected, rtol=0, atol=1e-4)
    facts = stream.facts
    assert (facts["seed"], facts["steps"], facts["guidance"], facts["precision"]) == (4, 3, 1.5, "fp32")
    assert facts["labels"] == "balanced"
    assert facts["nfe"] > 3


def test_bf16_is_only_for_tokenizer_and_generator(tiny_pae: PAE, tiny_dit: LightningDiT) -> None:
    labels = balanced_labels(2, 2)
    seen: set[tuple[str, bool]] = set()
    for name, network in (("generator", tiny_dit), ("decoder", tiny_pae.decoder)):
        network.register_forward_pre_hook(
            lambda *_, name=name: seen.add((name, torch.is_autocast_enabled("cpu")))
        )
    for precision, expected in (("bf16", True), ("fp32", False)):
        seen.clear()
        stream = sampled_images(
            tiny_pae, tiny_dit, labels, SamplerConfig(steps=2), size=32, precision=precision
        )  # type: ignore[arg-type]
        for batch in stream.batches(1):
            assert not torch.is_autocast_enabled("cpu")  # the extractor must run in float32
            assert batch.images.dtype == torch.float32
        assert seen == {("generator", expected), ("decoder", expected)}


def test_small_images_are_not_enlarged_silently(
    image_folder: Path, packed: PackedImages, tmp_path: Path
) -> None:
    source = ImageFolder(image_folder)  # their shorter sides are 35 to 44 pixels
    with pytest.warns(UserWarning, match=r"^2 of 10 images are smaller than 38 x 38 pixels and were"):
        list(source_batches(source, 38, 4))
    with pytest.raises(ValueError, match="all 10 images are smaller than the 64 x 64 pixels that are needed"):
        list(source_batches(source, 64, 4))
    with pytest.raises(ValueError, match="is of 32 x 32 pixels, 64 x 64 are needed"):
        list(source_batches(packed, 64, 4))


def test_unusable_samples_are_refused(levels: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no samples at .*none\.npz; give an npz file"):
        stored_images(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="is no npz file"):
        stored_images(tmp_path / "text.npz")
    np.savez(tmp_path / "named.npz", images=levels)
    with pytest.raises(ValueError, match=r"holds no images \(arr_0\); it holds: images"):
        stored_images(tmp_path / "named.npz")
    for name, array in {
        "float": levels / 255,
        "gray": levels[..., :1],
        "one": levels[0],
        "fortran": np.asfortranarray(levels),
    }.items():
        np.savez(tmp_path / f"{name}.npz", array)
        with pytest.raises(ValueError, match=r"must be uint8 images \(N, H, W, 3\) from 0 to 255, got"):
            stored_images(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "empty.npz", levels[:0])
    with pytest.raises(ValueError, match="holds no images"):
        stored_images(tmp_path / "empty.npz")
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(BrokenImage, match=r"0\.png cannot be decoded"):
        stored_images(folder)


def test_an_npz_that_was_cut_short_is_refused(levels: np.ndarray, tmp_path: Path) -> None:
    import zipfile

    np.savez(tmp_path / "full.npz", levels)
    with zipfile.ZipFile(tmp_path / "full.npz") as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", content[:-100])
    with pytest.raises(ValueError, match=r"short\.npz is damaged: arr_0 ends before its 7 images do"):
        all_images(stored_images(tmp_path / "short.npz"), 2)
