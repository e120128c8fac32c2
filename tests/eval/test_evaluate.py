"""Evaluation offline and inside training: one function, one record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from openpae import config as configs
from openpae.data.images import PackedImages, Subset
from openpae.data.shards import Shards
from openpae.eval.evaluate import evaluate_reconstruction, evaluate_samples
from openpae.eval.extractors import FeatureExtractor, load_extractor
from openpae.eval.image_stream import real_images, sampled_images, tensor_images
from openpae.eval.reference import Reference, open_reference, save_reference
from openpae.geometry.measure import measure_tokenizer
from openpae.geometry.settings import MeasureConfig
from openpae.interop.spaces import pae_space
from openpae.models.lpips import LPIPS
from openpae.models.lpips_weights import load_perceptual
from openpae.models.tokenizer import PAE
from openpae.sampling.sampler import balanced_labels
from openpae.sampling.settings import SamplerConfig
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask

COMMON = {"value_range", "device", "processes", "versions", "kind", "metrics", "image_size"}
DISTANCE = {
    *("undefined", "samples", "samples_sha256", "duplicates", "extractor", "extractor_weights"),
    *("reference", "reference_sha256", "reference_n", "reference_preprocessing"),
}


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return load_extractor("random")


@pytest.fixture
def reference(packed: PackedImages, extractor: FeatureExtractor) -> Reference:
    return open_reference(packed.shards.folder, extractor)


def test_the_record_of_reconstructions_is_complete(
    tiny_pae: PAE, packed: PackedImages, extractor: FeatureExtractor
) -> None:
    lpips = load_perceptual("random")
    record = evaluate_reconstruction(
        tiny_pae,
        real_images(packed, 32, name="drawn"),
        extractor=extractor,
        lpips=lpips,
        min_samples=2,
        facts={"tokenizer": "abc"},
    )
    assert record.keys() == COMMON | DISTANCE | {"images", "data", "lpips", "lpips_weights", "tokenizer"}
    assert (record["images"], record["samples"], record["reference_n"]) == (10, 10, 10)
    assert (record["reference"], record["tokenizer"]) == ("drawn", "abc")
    assert record["data"] == packed.fingerprint()
    assert record["extractor_weights"] == extractor.weights
    assert (record["device"], record["processes"]) == ("cpu", 1)
    assert "centre crop to 32 x 32" in record["reference_preprocessing"]
    assert {"torch", "openpae", "python"} <= record["versions"].keys()
    assert {"psnr", "ssim", "lpips", "frechet"} <= record["metrics"].keys()
    json.dumps(record)


def test_the_record_of_samples_is_complete(reference: Reference, extractor: FeatureExtractor) -> None:
    facts = {"seed": 3, "nfe": 20, "labels": "class-balanced", "tokenizer": "t", "generator": "g"}
    samples = tensor_images(torch.rand(6, 3, 32, 32), name="six", facts=facts)
    record = evaluate_samples(samples, reference, extractor=extractor, min_samples=2)
    sampling = {"samples_from", "samples_preprocessing", "tokenizer", "generator", "sampler"}
    assert record.keys() == COMMON | DISTANCE | sampling
    assert (record["tokenizer"], record["generator"], record["samples_from"]) == ("t", "g", "six")
    assert record["sampler"] == {"seed": 3, "nfe": 20, "labels": "class-balanced"}
    metrics = record["metrics"]
    assert metrics.keys() == {
        "frechet", "kid", "mind", "precision", "recall", "frechet_floor", "frechet_ratio",
    }  # fmt: skip
    ratio = metrics["frechet"]["value"] / metrics["frechet_floor"]["value"]
    assert metrics["frechet_ratio"]["value"] == pytest.approx(ratio)
    assert record["undefined"].keys() == {"spatial_frechet", "inception_score"}
    json.dumps(record)


def test_a_record_of_other_samples_is_refused(reference: Reference, extractor: FeatureExtractor) -> None:
    images = torch.rand(6, 3, 32, 32)
    record = evaluate_samples(tensor_images(images), reference, extractor=extractor, min_samples=2)
    facts = {"samples_sha256": record["samples_sha256"]}
    flipped = tensor_images(images.flip(0), facts=facts)
    again = evaluate_samples(flipped, reference, extractor=extractor, min_samples=2)
    assert again["samples_sha256"] == facts["samples_sha256"]  # the order does not matter
    other = tensor_images(1 - images, name="other", facts=facts)
    with pytest.raises(ValueError, match="the record beside other describes other samples"):
        evaluate_samples(other, reference, extractor=extractor, min_samples=2)


def test_few_samples_and_duplicates_give_a_warning(reference: Reference, extractor: FeatureExtractor) -> None:
    images = torch.rand(6, 3, 32, 32)
    with pytest.warns(UserWarning, match="only 6 samples"):
        evaluate_samples(tensor_images(images), reference, extractor=extractor)
    images[4] = images[1]
    with pytest.warns(UserWarning, match="1 of 6 samples equal an earlier one"):
        record = evaluate_samples(tensor_images(images), reference, extractor=extractor, min_samples=2)
    assert record["duplicates"] == 1


@pytest.mark.parametrize("size", [(16, 16), (32, 40), (40, 32)])
def test_samples_of_another_size_are_refused_before_any_work(
    size: tuple[int, int], reference: Reference, extractor: FeatureExtractor
) -> None:
    samples = dataclasses.replace(
        tensor_images(torch.rand(2, 3, *size)), batches=lambda _: pytest.fail("work")
    )
    with pytest.raises(ValueError, match=r"size of the reference, \(32, 32\), got \(\d+, \d+\)"):
        evaluate_samples(samples, reference, extractor=extractor)


def test_the_batch_size_changes_rounding_only(
    tiny_pae: PAE, packed: PackedImages, extractor: FeatureExtractor
) -> None:
    one, many = (
        evaluate_reconstruction(
            tiny_pae, real_images(packed, 32), extractor=extractor, lpips=None, batch_size=size, min_samples=2
        )
        for size in (1, 10)
    )
    for name in ("psnr", "ssim", "frechet"):
        assert one["metrics"][name]["value"] == pytest.approx(many["metrics"][name]["value"], rel=1e-4)


def test_real_images_against_themselves_have_distance_zero(
    packed: PackedImages, reference: Reference, extractor: FeatureExtractor
) -> None:
    record = evaluate_samples(real_images(packed, 32), reference, extractor=extractor, min_samples=2)
    assert record["metrics"]["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert record["metrics"]["precision"]["value"] == 1


def test_a_subset_is_other_data(packed: PackedImages) -> None:
    some = Subset(packed, [4, 0, 2])
    assert len(some) == 3
    assert some.labels.tolist() == packed.labels[[4, 0, 2]].tolist()
    assert some.read(0).tobytes() == packed.read(4).tobytes()
    assert len({some.fingerprint(), packed.fingerprint(), Subset(packed, [4, 0, 3]).fingerprint()}) == 3


@pytest.fixture
def evaluated_run(tokenizer_folder: Path, packed: PackedImages, latents: Shards) -> GeneratorRun:
    return dataclasses.replace(
        configs.load(GeneratorRun, "generator/tiny"),
        latents=latents.folder,
        tokenizer=tokenizer_folder,
        evaluation_images=packed.shards.folder,
        evaluation_samples=6,
        extractor="random",
        sampler=SamplerConfig(steps=2),
    )


def test_training_evaluates_samples_as_the_command_does(
    evaluated_run: GeneratorRun, reference: Reference, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    task = GeneratorTask(evaluated_run)
    task.run_dir = tmp_path
    inside = task.evaluate(30)
    assert task.evaluator is not None
    samples = sampled_images(
        task.evaluator.tokenizer, task.model, balanced_labels(6, 2), evaluated_run.sampler, size=32
    )
    offline = evaluate_samples(samples, reference, extractor=extractor, min_samples=2)
    assert inside["frechet"] == pytest.approx(offline["metrics"]["frechet"]["value"], rel=1e-6)
    record = json.loads((tmp_path / "evaluations" / "step-00000030.json").read_text())
    assert (record["step"], record["samples_sha256"]) == (30, offline["samples_sha256"])
    assert record["sampler"]["labels"] == "class-balanced"
    assert len(record["tokenizer"]) == 16


def test_training_takes_a_saved_reference(
    evaluated_run: GeneratorRun, reference: Reference, tmp_path: Path
) -> None:
    save_reference(reference, tmp_path / "reference.npz")
    kept = dataclasses.replace(evaluated_run, evaluation_images=tmp_path / "reference.npz")
    torch.testing.assert_close(
        GeneratorTask(kept).evaluate(0), GeneratorTask(evaluated_run).evaluate(0), rtol=1e-6, atol=1e-6
    )


def test_training_a_tokenizer_writes_a_record(packed: PackedImages, tmp_path: Path) -> None:
    run = configs.load(TokenizerRun, "tokenizer/tiny")
    folder = packed.shards.folder
    data = dataclasses.replace(run.data, images=folder, evaluation=folder, evaluation_images=6)
    loss = dataclasses.replace(run.loss, lpips=1.0, lpips_net="random")
    task = TokenizerTask(dataclasses.replace(run, data=data, loss=loss))
    task.run_dir = tmp_path
    metrics = task.evaluate(7)
    record = json.loads((tmp_path / "evaluations" / "step-00000007.json").read_text())
    assert metrics == {name: metric["value"] for name, metric in record["metrics"].items()}
    assert (record["images"], record["step"], record["lpips"]) == (6, 7, "lpips-random")


@pytest.mark.filterwarnings("ignore:eRank of 6 images")
def test_training_a_tokenizer_measures_geometry_and_distances(packed: PackedImages) -> None:
    run = configs.load(TokenizerRun, "tokenizer/tiny")
    folder = packed.shards.folder
    data = dataclasses.replace(run.data, images=folder, evaluation=folder, evaluation_images=6)
    loss = dataclasses.replace(run.loss, lpips=1.0, lpips_net="random")
    run = dataclasses.replace(run, data=data, loss=loss, geometry=True, extractor="random")
    task = TokenizerTask(run)
    task.model.eval()
    metrics = task.evaluate(7)
    assert metrics.keys() == {
        *("psnr", "ssim", "lpips", "frechet", "frechet_floor", "frechet_ratio"),
        *("kid", "mind", "precision", "recall"),
        *("lpc", "gsq", "erank"),
    }
    space = pae_space(task.model, "same", "")
    held_out = Subset(packed, [0, 2, 4, 5, 7, 9])
    config = MeasureConfig(count=6, lpc_count=1)
    expected = measure_tokenizer(space, held_out, size=32, lpips=task.lpips, config=config).metrics
    for name in ("lpc", "gsq", "erank", "psnr"):
        assert metrics[name] == pytest.approx(expected[name].value, rel=1e-4), name


def test_training_refuses_to_evaluate_with_another_tokenizer(
    tmp_path: Path, tiny_pae: PAE, packed: PackedImages, latents: Shards
) -> None:
    from openpae.models.saved import write_tokenizer

    write_tokenizer(tmp_path, tiny_pae.state_dict(), tiny_pae.config, "0" * 16)
    run = dataclasses.replace(
        configs.load(GeneratorRun, "generator/tiny"),
        latents=latents.folder,
        tokenizer=tmp_path,
        evaluation_images=packed.shards.folder,
    )
    with pytest.raises(ValueError, match=r"latents holds latents of the tokenizer .*, but .* is "):
        GeneratorTask(run).evaluate(0)


def test_a_tokenizer_without_evaluation_images_is_refused() -> None:
    run = configs.load(GeneratorRun, "generator/tiny")
    with pytest.raises(ValueError, match="both, or neither"):
        dataclasses.replace(run, tokenizer=Path("somewhere"))


def test_perceptual_networks_for_trials_are_fixed() -> None:
    a, b = load_perceptual("random"), load_perceptual("random")
    assert isinstance(a, LPIPS)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
