"""Evaluations as a user runs them, offline and inside training: one function, one record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from openpae import config as configs
from openpae.critics import LPIPS, load_perceptual
from openpae.data.images import PackedImages, Subset
from openpae.data.shards import Shards
from openpae.eval.records import evaluate_reconstruction, evaluate_samples, features_of, load_extractor
from openpae.eval.reference import FeatureSet
from openpae.sampling import SamplerConfig, balanced_labels, sample_images
from openpae.tokenizer import PAE
from openpae.train.generator import GeneratorRun, GeneratorTask


def test_a_record_says_what_the_numbers_stand_on(tiny_pae: PAE, packed: PackedImages) -> None:
    extractor = load_extractor("random")
    record = evaluate_reconstruction(
        tiny_pae, packed, extractor=extractor, lpips=load_perceptual("random"), min_samples=2
    )
    assert record["images"] == len(packed)
    assert record["data"] == packed.fingerprint()
    assert record["extractor_weights"] == extractor.weights
    assert {"torch", "openpae", "python"} <= record["versions"].keys()
    assert {"psnr", "ssim", "lpips", "frechet"} <= record["metrics"].keys()
    json.dumps(record)  # as it stands


def test_few_samples_are_warned_of(packed: PackedImages) -> None:
    with pytest.warns(UserWarning, match="only 6 samples"):
        evaluate_samples([torch.rand(6, 3, 32, 32)], packed, extractor=load_extractor("random"), size=32)


def test_the_batch_size_does_not_move_a_metric(tiny_pae: PAE, packed: PackedImages) -> None:
    one, many = (
        evaluate_reconstruction(tiny_pae, packed, extractor=None, lpips=None, batch_size=size)
        for size in (1, 10)
    )
    for name in ("psnr", "ssim"):
        assert one["metrics"][name]["value"] == pytest.approx(many["metrics"][name]["value"], rel=1e-4)


def test_real_images_against_themselves_have_distance_zero(packed: PackedImages) -> None:
    batches = packed.shards.gather(torch.arange(len(packed)).numpy()).float() / 255
    record = evaluate_samples([batches], packed, extractor=load_extractor("random"), size=32, min_samples=2)
    assert record["metrics"]["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert record["metrics"]["precision"]["value"] == 1


def test_a_reference_made_before_gives_the_same_record(packed: PackedImages) -> None:
    extractor = load_extractor("random")
    samples = [torch.rand(6, 3, 32, 32)]
    fresh = evaluate_samples(samples, packed, extractor=extractor, size=32, min_samples=2)
    real = features_of(packed, extractor, 32)
    assert isinstance(real, FeatureSet)
    kept = evaluate_samples(samples, packed, extractor=extractor, size=32, real=real, min_samples=2)
    assert kept["metrics"] == fresh["metrics"]


def test_a_subset_is_other_data(packed: PackedImages) -> None:
    some = Subset(packed, [4, 0, 2])
    assert len(some) == 3
    assert some.labels.tolist() == packed.labels[[4, 0, 2]].tolist()
    assert some.read(0).tobytes() == packed.read(4).tobytes()
    assert len({some.fingerprint(), packed.fingerprint(), Subset(packed, [4, 0, 3]).fingerprint()}) == 3


def test_training_judges_samples_as_the_command_does(
    tokenizer_folder: Path, packed: PackedImages, latents: Shards
) -> None:
    run = configs.load(GeneratorRun, "generator/tiny")
    run = dataclasses.replace(
        run,
        latents=latents.folder,
        tokenizer=tokenizer_folder,
        evaluation_images=packed.shards.folder,
        evaluation_samples=6,
        extractor="random",
        sampler=SamplerConfig(steps=2),
    )
    task = GeneratorTask(run)
    inside = task.evaluate(0)
    assert task.judge is not None
    images = sample_images(task.judge.tokenizer, task.model, balanced_labels(6, 2), run.sampler, batch_size=8)
    offline = evaluate_samples(images, packed, extractor=load_extractor("random"), size=32, min_samples=2)
    assert inside["frechet"] == pytest.approx(offline["metrics"]["frechet"]["value"], rel=1e-6)


def test_training_refuses_to_judge_with_another_tokenizer(
    tmp_path: Path, tiny_pae: PAE, packed: PackedImages, latents: Shards
) -> None:
    from openpae.checkpoint import write_tokenizer

    write_tokenizer(tmp_path, tiny_pae.state_dict(), tiny_pae.config, "0" * 16)
    run = dataclasses.replace(
        configs.load(GeneratorRun, "generator/tiny"),
        latents=latents.folder,
        tokenizer=tmp_path,
        evaluation_images=packed.shards.folder,
    )
    with pytest.raises(ValueError, match="but the latents are those of"):
        GeneratorTask(run).evaluate(0)


def test_half_a_judge_is_refused() -> None:
    run = configs.load(GeneratorRun, "generator/tiny")
    with pytest.raises(ValueError, match="both, or neither"):
        dataclasses.replace(run, tokenizer=Path("somewhere"))


def test_extractors_say_what_they_need(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--extractor-weights"):
        load_extractor("inception")
    with pytest.raises(ValueError, match="must be left out"):
        load_extractor("vgg16", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_extractor("inception", tmp_path / "nothing.pth")


def test_perceptual_networks_for_trials_are_fixed() -> None:
    a, b = load_perceptual("random"), load_perceptual("random")
    assert isinstance(a, LPIPS)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
