"""Tiny studies for the tests of this folder."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openpae import config as configs
from openpae.study.plan import Plan, make_plan
from openpae.study.run import run_plan
from openpae.study.settings import Study, StudyData, StudyRow
from openpae.study.table import Result

QUICK = [
    *("refiner.loop.steps=2", "tokenizer.loop.steps=2", "generator.loop.steps=4"),
    *("generator.loop.save_every=2", "generator.loop.keep_every=2"),
    *("measure.metrics.count=8", "judge.samples=4"),
]


def tiny(**changes: Any) -> Study:
    """The preset study/tiny with changes."""
    return dataclasses.replace(configs.load(Study, "study/tiny"), **changes)


@pytest.fixture(scope="session")
def data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    """The drawn images, also as held-out images, and label maps for two of them."""
    root = tmp_path_factory.mktemp("labelled")
    for number in range(2):
        shutil.copy(image_folder / "boxes" / f"{number}.png", root / f"{number}.png")
        with Image.open(root / f"{number}.png") as image:
            halves = np.zeros((image.height, image.width), dtype=np.uint8)
        halves[:, halves.shape[1] // 2 :] = 1
        (root / "maps").mkdir(exist_ok=True)
        Image.fromarray(halves).save(root / "maps" / f"{number}.png")
        (root / "images").mkdir(exist_ok=True)
        (root / f"{number}.png").rename(root / "images" / f"{number}.png")
    return StudyData(
        images=image_folder, held_out=image_folder, label_images=root / "images", label_maps=root / "maps"
    )


def planned(data: StudyData, out: Path, *studies: Study, **options: Any) -> Plan:
    return make_plan(studies or [tiny()], data, out, **options)


def result(study: Study, row: StudyRow, seed: int, value: float) -> Result:
    """A Frechet distance of samples."""
    return Result(
        study=study.name, row=row.name, seed=seed, metric="gfid", step=240, value=value, stderr=None,
        seconds=1, commit="",
    )  # fmt: skip


@pytest.fixture(scope="session")
def done(data: StudyData, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A finished study of two rows and one seed."""
    plan = planned(data, tmp_path_factory.mktemp("study"), changes=QUICK, rows=["none", "full"], seeds=[0])
    assert run_plan(plan, command="pae study tiny", log=lambda _: None) == []
    return plan


def read(plan: Plan) -> list[dict[str, str]]:
    """The rows of results.csv."""
    with (plan.layout.out / "tiny" / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
