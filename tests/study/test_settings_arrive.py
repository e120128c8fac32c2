"""Every setting of a study's `measure` and `judge` reaches the results and their records."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpae import config as configs
from openpae.data.decode import read_image
from openpae.data.images import chosen_rows, open_images
from openpae.data.label_maps import read_segmented
from openpae.data.pixels import image_grid
from openpae.eval.extractors import load_extractor
from openpae.eval.features import features_of
from openpae.eval.image_stream import real_images
from openpae.eval.reference import read_reference
from openpae.geometry.measure import measure_tokenizer
from openpae.geometry.settings import MeasureConfig
from openpae.interop.spaces import open_tokenizer
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import load_generator, load_tokenizer
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import read_json
from openpae.storage.model_folder import checkpoint_path
from openpae.study.plan import Plan, make_plan
from openpae.study.run import run_plan
from openpae.study.settings import JudgeSettings, MeasureSettings, Study, StudyData
from openpae.study.work import REFERENCE

pytestmark = [
    pytest.mark.filterwarnings("ignore:eRank of"),
    pytest.mark.filterwarnings("ignore:.*classes hold one image"),
]
MEASURE = {
    "metrics.count": 8, "metrics.lpc_count": 3, "metrics.directions": 2, "metrics.sigma": 0.3,
    "metrics.classes": 3, "metrics.repeats": 4, "metrics.batch_size": 3, "metrics.seed": 5,
    "label_count": 1, "ignore": 2,
}  # fmt: skip
JUDGE = {
    "samples": 6, "sampler.steps": 3, "sampler.guidance": 1.5, "reference_images": 5, "own_images": 4,
    "precision": "bf16", "batch_size": 3, "seed": 7, "curve": "false",
}  # fmt: skip
QUICK = [
    "refiner.loop.steps=2",
    "tokenizer.loop.steps=2",
    "generator.loop.steps=2",
    "generator.model.num_classes=5",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    """Ten images of five classes; two of them with label maps, in which 2 does not count."""
    root = tmp_path_factory.mktemp("study-data")
    draws = np.random.default_rng(0)
    for number in range(10):
        folder = root / "images" / f"class {number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    for folder in ("scenes", "maps"):
        (root / folder).mkdir()
    for number in range(2):
        shutil.copy(root / "images" / "class 0" / "5.png", root / "scenes" / f"{number}.png")
        label = np.zeros((32, 32), np.uint8)
        label[:, 16:], label[:8] = 1, 2
        Image.fromarray(label).save(root / "maps" / f"{number}.png")
    return StudyData(
        images=root / "images",
        held_out=root / "images",
        label_images=root / "scenes",
        label_maps=root / "maps",
    )


@pytest.fixture(scope="module")
def done(data: StudyData, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    changes = [*QUICK, *(f"measure.{name}={value}" for name, value in MEASURE.items())]
    changes += [f"judge.{name}={value}" for name, value in JUDGE.items()]
    study = dataclasses.replace(configs.load(Study, "study/tiny"), claims=(), faster=None)
    plan = make_plan(
        [study], data, tmp_path_factory.mktemp("study"), changes=changes, rows=["none"], seeds=[0]
    )
    assert run_plan(plan, command="pae study tiny", log=lambda _: None) == []
    return plan


def folder_of(plan: Plan, kind: str) -> tuple[str, Path]:
    """The last stage of a kind, and its folder."""
    name = [name for name, stage in plan.stages.items() if stage.kind == kind][-1]
    return name, plan.layout.folder(name)


def test_no_setting_is_left_out_here() -> None:
    """But the networks, whose weights must be fetched."""
    measured = {name.split(".")[0] for name in MEASURE} | {"lpips", "extractor", "extractor_weights"}
    assert measured == {part.name for part in fields(MeasureSettings)}
    assert {f"metrics.{part.name}" for part in fields(MeasureConfig)} <= set(MEASURE)
    drawn = {name.split(".")[0] for name in JUDGE} | {"extractor", "extractor_weights"}
    assert drawn == {part.name for part in fields(JudgeSettings)}


def test_a_tokenizer_is_measured_with_them(done: Plan, data: StudyData) -> None:
    name, _ = folder_of(done, "measure")
    config = MeasureConfig(
        count=8, lpc_count=3, directions=2, sigma=0.3, classes=3, repeats=4, batch_size=3, seed=5
    )
    source, random = open_images(data.held_out), load_extractor("random")
    assert data.label_images is not None
    assert data.label_maps is not None
    measured = measure_tokenizer(
        open_tokenizer(f"openpae:{folder_of(done, 'tokenizer')[1]}"),
        source,
        size=32,
        segmented=read_segmented(data.label_images, data.label_maps, size=32, count=1, ignore=2),
        lpips=load_perceptual("random"),
        real=features_of(real_images(source, 32, rows=chosen_rows(source, 8)), random, 3),
        config=config,
    )
    record = read_json(done.layout.record(name))["metrics"]
    names = {"frechet": "rfid", "interpolated_frechet": "ifid"}
    assert len(measured.metrics) == len(record) == 12  # all but VIV, which needs four images of two classes
    for key, estimate in measured.metrics.items():
        assert record[names.get(key, key)]["value"] == pytest.approx(estimate.value, rel=1e-4), key


def test_samples_are_drawn_and_compared_with_them(done: Plan) -> None:
    record: dict[str, Any] = read_json(folder_of(done, "judge")[1] / "evaluation.json")
    sampler = record["sampler"]
    assert (sampler["seed"], sampler["steps"], sampler["guidance"]) == (7, 3, 1.5)
    assert sampler["precision"] == "bf16"
    assert record["samples"] == 6
    assert record["reference_n"] == 5
    assert {"frechet", "frechet_own"} <= record["metrics"].keys()
    own = folder_of(done, "own-reference")[1] / REFERENCE
    assert read_reference(own, load_extractor("random")).pooled.n == 4


def test_the_noise_is_that_of_the_seed(done: Plan) -> None:
    """The picture of the samples holds those that the sampler draws with this seed, in their order."""
    generator = load_generator(checkpoint_path(folder_of(done, "generator")[1], 2))
    tokenizer = load_tokenizer(folder_of(done, "tokenizer")[1])
    stage = done.stages[folder_of(done, "judge")[0]].settings
    assert isinstance(stage.settings.sampler, SamplerConfig)
    with torch.autocast("cpu", torch.bfloat16):
        labels = balanced_labels(6, generator.config.num_classes)
        batches = sample_images(tokenizer, generator, labels, stage.settings.sampler, seed=7, batch_size=3)
        expected = image_grid(torch.cat(list(batches)).float(), 10)
    kept = read_image(folder_of(done, "judge")[1] / "samples.png")
    difference = np.abs(np.asarray(expected).astype(int) - np.asarray(kept).astype(int))
    assert difference.max() <= 2
