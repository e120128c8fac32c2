"""Pipeline: classes to images in one call, with a tokenizer and a generator of its latents."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from openpae.models.dit import LightningDiT
from openpae.models.saved import load_generator, load_tokenizer, write_generator, write_tokenizer
from openpae.models.tokenizer import PAE
from openpae.sampling.pipeline import Pipeline
from openpae.sampling.sampler import sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.model_folder import checkpoint_path, identity_of


@pytest.fixture
def pair(tiny_dit: LightningDiT, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """Two run folders beside other files, as `pae quickstart` writes them."""
    folder = tmp_path / "pair"
    shutil.copytree(tokenizer_folder, checkpoint_path(folder / "tokenizer", 4))
    target = checkpoint_path(folder / "generator", 4)
    target.mkdir(parents=True)
    write_generator(target, tiny_dit.state_dict(), tiny_dit.config, identity_of(tokenizer_folder).fingerprint)
    (folder / "report.html").touch()
    return folder


def test_its_images_are_those_of_sample_images(pair: Path) -> None:
    pipeline = Pipeline.from_pretrained(pair)
    images = pipeline(class_labels=[1, 0, 2], steps=3, seed=5, output="tensor")
    labels, config = torch.tensor([1, 0, 2]), SamplerConfig(steps=3)
    tokenizer, generator = load_tokenizer(pair / "tokenizer"), load_generator(pair / "generator")
    expected = torch.cat(list(sample_images(tokenizer, generator, labels, config, seed=5)))
    assert torch.equal(images, expected)
    assert images.shape == (3, 3, 32, 32)
    pictures = pipeline([1, 0, 2], seed=5, sampler=SamplerConfig(steps=3))
    assert [picture.size for picture in pictures] == [(32, 32)] * 3
    levels = np.stack([np.asarray(picture) for picture in pictures])
    np.testing.assert_array_equal(levels, (images * 255).round().permute(0, 2, 3, 1).numpy())


def test_an_image_depends_on_its_seed_index_and_class_alone(pair: Path) -> None:
    pipeline = Pipeline.from_pretrained(pair).to("cpu")
    all_at_once = pipeline([0, 1, 1], steps=2, output="tensor")
    one_by_one = pipeline([0, 1, 0], steps=2, output="tensor", batch_size=1)
    torch.testing.assert_close(all_at_once[:2], one_by_one[:2], rtol=0, atol=1e-5)
    assert not torch.allclose(all_at_once[2], one_by_one[2], atol=1e-3)
    assert not torch.allclose(all_at_once, pipeline([0, 1, 1], steps=2, seed=1, output="tensor"), atol=1e-3)


def test_a_pair_must_be_complete_and_belong_together(pair: Path, tiny_pae: PAE, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_tokenizer(tmp_path / "other", tiny_pae.state_dict(), tiny_pae.config, "0" * 16)
    with pytest.raises(ValueError, match="decode with the tokenizer that the generator was trained with"):
        Pipeline.join(tmp_path / "other", pair / "generator")
    assert Pipeline.join(pair / "tokenizer", pair / "generator").tokenizer.encoder is None
    shutil.rmtree(pair / "generator")
    with pytest.raises(FileNotFoundError, match=r"holds no pair: it lacks generator; Pipeline.join"):
        Pipeline.from_pretrained(pair)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_pair_still_belongs_together(pair: Path, tmp_path: Path, precision: str) -> None:
    pipeline = Pipeline.from_pretrained(pair)
    pipeline.save_pretrained(tmp_path / "saved", precision=precision)  # type: ignore[arg-type]
    again = Pipeline.from_pretrained(tmp_path / "saved")
    images, repeated = (p([0, 1], steps=2, output="tensor") for p in (pipeline, again))
    torch.testing.assert_close(repeated, images, rtol=0, atol=0 if precision == "fp32" else 0.05)
    same = [
        identity_of(tmp_path / "saved" / part) == identity_of(pair / part)
        for part in ("tokenizer", "generator")
    ]
    assert same == [precision == "fp32"] * 2
    assert "Pipeline.from_pretrained" in (tmp_path / "saved" / "README.md").read_text()


def test_invalid_arguments_are_refused(pair: Path) -> None:
    pipeline = Pipeline.from_pretrained(pair)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        pipeline([3], steps=1)
    with pytest.raises(ValueError, match="at least one class"):
        pipeline([])
    with pytest.raises(ValueError, match="output must be 'pil' or 'tensor', got 'numpy'"):
        pipeline([0], output="numpy")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        pipeline([0], steps=0)
