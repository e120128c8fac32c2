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
from openpae.storage.model_folder import checkpoint_path, identity_of, model_folder, write_classes


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


def test_the_names_of_diffusers_mean_the_same(pair: Path) -> None:
    pipeline = Pipeline.from_pretrained(pair)
    config = SamplerConfig(steps=3, guidance=1.5)
    images = pipeline([1, 0, 2], seed=5, sampler=config, output="tensor")
    draw = {"num_inference_steps": 3, "guidance_scale": 1.5}
    for output_type, expected in (("pt", images), ("np", images.permute(0, 2, 3, 1).numpy())):
        seed = torch.Generator().manual_seed(5)
        result = pipeline([1, 0, 2], generator=seed, output_type=output_type, **draw)  # type: ignore[call-overload]
        assert type(result.images) is type(expected)
        assert (result.images == expected).all()
        assert len(result) == 3
        assert (result[1] == expected[1]).all()
    latents = pipeline([1, 0, 2], seed=5, output_type="latent", batch_size=2, **draw).images
    decoded = pipeline.tokenizer.decode(latents).clamp(0, 1)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-5)
    pictures = pipeline([1, 0, 2], seed=5, **draw)
    assert pictures.images == list(pictures)
    assert [np.asarray(picture).tolist() for picture in pictures] == [
        np.asarray(picture).tolist() for picture in pipeline([1, 0, 2], seed=5, sampler=config)
    ]


def test_a_used_generator_gives_other_images(pair: Path) -> None:
    pipeline, generator = Pipeline.from_pretrained(pair), torch.Generator().manual_seed(5)
    draw = {"steps": 1, "output": "tensor", "generator": generator}
    first, second = pipeline([0], **draw), pipeline([0], **draw)
    assert torch.equal(first, pipeline([0], seed=5, steps=1, output="tensor"))
    assert not torch.allclose(first, second, atol=1e-3)
    generator.manual_seed(5)
    assert torch.equal(first, pipeline([0], **draw))
    assert torch.equal(second, pipeline([0], **draw))


def test_two_names_with_two_values_are_refused(pair: Path) -> None:
    pipeline = Pipeline.from_pretrained(pair)
    new = torch.Generator().manual_seed
    assert pipeline(
        [0], steps=1, num_inference_steps=1, seed=3, generator=new(3), output="pil", output_type="pil"
    )
    for given, message in (
        ({"steps": 1, "num_inference_steps": 2}, "steps and num_inference_steps mean the same, got 1 and 2"),
        ({"seed": 1, "generator": new(2)}, "seed and generator mean the same, got 1 and 2; give one of them"),
        (
            {"output": "tensor", "output_type": "np"},
            "output and output_type mean the same, got 'pt' and 'np'",
        ),
        ({"output_type": "tensor"}, "output_type must be one of pil, np, pt, latent, got 'tensor'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline([0], **given)
    with pytest.raises(TypeError, match=r"generator must be one torch\.Generator, got list"):
        pipeline([0], generator=[new(1)])  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_samples_as_under_autocast(
    pair: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    draw = {"steps": 4, "output": "tensor"}
    plain = Pipeline.from_pretrained(pair)
    with torch.autocast("cpu", dtype):
        expected = plain([0, 1], **draw)
    half = Pipeline.from_pretrained(pair, torch_dtype=dtype)
    assert torch.equal(half([0, 1], **draw), expected)
    assert half.tokenizer.half_dtype == half.generator.half_dtype == dtype
    cast = plain.to("cpu", dtype) if dtype == torch.bfloat16 else plain.half()
    assert torch.equal(cast([0, 1], **draw), expected)
    half.save_pretrained(tmp_path / "saved")
    again = Pipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    assert torch.equal(again([0, 1], **draw), expected)
    assert plain.float().generator.half_dtype is None
    assert plain.bfloat16().tokenizer.half_dtype == torch.bfloat16


def test_classes_by_name_are_those_by_number(pair: Path, tmp_path: Path) -> None:
    """Also after the pair is saved and loaded; the names of a run folder are those of its checkpoint."""
    draw = {"steps": 1, "output": "tensor"}
    with pytest.raises(
        ValueError, match=r"the generator keeps no names of its classes, so 'cat' is not known"
    ):
        Pipeline.from_pretrained(pair)(["cat"], **draw)
    write_classes(model_folder(pair / "generator"), ["cat", "dog"], [3, 4])
    pipeline = Pipeline.from_pretrained(pair)
    pipeline.save_pretrained(tmp_path / "saved")
    for each in (pipeline, Pipeline.from_pretrained(tmp_path / "saved")):
        assert each.generator.classes == (["cat", "dog"], [3, 4])
        assert torch.equal(each(["dog", 0, "cat"], **draw), each([1, 0, 0], **draw))
    with pytest.raises(ValueError, match=r"the generator has no class 'cta'; did you mean 'cat'"):
        pipeline(["cta"], **draw)
    with pytest.raises(
        ValueError, match=r"class_labels must be a list of classes, got 'cat'; write it in \[\]"
    ):
        pipeline("cat", **draw)
    with pytest.raises(TypeError, match=r"a class is an integer or a name, got 1\.0"):
        pipeline([1.0], **draw)  # type: ignore[list-item]
    assert "class_labels=['cat', 'dog']" in (tmp_path / "saved" / "README.md").read_text()
