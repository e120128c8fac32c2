"""Three optimizer steps of a refiner, computed without the engine; by_hand.py lists the shared parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from openpae.data.images import PackedImages
from openpae.data.settings import ImageData
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.run_folder import open_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import LowPassConfig, RefinerConfig
from openpae.storage.model_folder import checkpoint_path
from openpae.train.refiner import RefinerTask
from openpae.train.settings import RefinerRun
from tests.by_hand import (
    BATCH,
    LOOP,
    OPTIM,
    STEPS,
    AdamWByHand,
    assert_equal,
    averaged,
    double_precision,
    gradients_of,
    gram,
    learning_rate,
    order,
    snapshot,
    trained,
)
from tests.conftest import shaken

SEED, PART = 2, 2
CLIP = 1.0
STRENGTH, SIGMA, REPRESENTATION, GRAM = 0.7, 0.8, 0.3, 0.6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as torchvision has them."""


@pytest.fixture
def exact(packed: PackedImages) -> Iterator[None]:
    with double_precision():
        yield


@pytest.fixture
def run(packed: PackedImages, exact: None) -> RefinerRun:
    """Nothing at its default."""
    return RefinerRun(
        model=RefinerConfig(
            feature_dim=48, latent_dim=8, grid_size=4, num_heads=4, decoder_layers=1, decoder_dim=32,
            decoder_heads=4,
        ),
        encoder="random-tiny",
        image_size=32,
        data=ImageData(images=packed.shards.folder, augment="flip"),
        low_pass=LowPassConfig(strength=STRENGTH, sigma=SIGMA),
        reconstruction=REPRESENTATION,
        gram=GRAM,
        optim=OptimConfig(**OPTIM, clip=CLIP),
        loop=LoopConfig(**LOOP, device_batch_size=PART, seed=SEED),
    )  # fmt: skip


def upsampled(features: Tensor, x: Tensor, upsampler: str) -> Tensor:
    """Maps (B, D, 32, 32) of features (B, D, 4, 4): bilinear, or joint bilateral (Kopf et al. 2007)."""
    if upsampler == "bilinear":
        return F.interpolate(features, size=32, mode="bilinear", align_corners=False)
    cells = x.unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean(dim=(3, 5))  # the mean colour of each
    maps = torch.empty(len(x), features.shape[1], 32, 32)
    for i in range(32):
        for j in range(32):
            down, right = ((p + 0.5) / 8 - 0.5 - torch.arange(4) for p in (i, j))
            near = (down.abs()[:, None] <= 2) & (right.abs() <= 2)
            place = torch.exp(-(down[:, None] ** 2 + right**2) / 2)
            unlike = (x[:, :, i, j, None, None] - cells).square().sum(dim=1)
            weight = near * place * torch.exp(-unlike / (2 * 0.1**2))
            weight = weight / weight.sum(dim=(1, 2), keepdim=True)
            maps[:, :, i, j] = torch.einsum("bhw,bdhw->bd", weight, features)
    return maps


def reference(features: Tensor, x: Tensor, upsampler: str) -> Tensor:
    """H_ref as tokens: upsample, blend with a Gaussian blur of SIGMA cells, sample the cells (Sec. 3.3)."""
    maps = upsampled(features.mT.unflatten(2, (4, 4)), x, upsampler)
    pixels = torch.arange(32) / 8
    kernel = torch.exp(-((pixels[:, None] - pixels) ** 2) / (2 * SIGMA**2))
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    maps = (1 - STRENGTH) * maps + STRENGTH * (kernel @ maps @ kernel.mT)
    return F.interpolate(maps, size=4, mode="bilinear", align_corners=False).flatten(2).mT


def by_hand(
    task: Any, run: RefinerRun
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
    """Weights, average and log of three steps."""
    images = torch.from_numpy(
        np.stack([x for file in sorted(run.data.images.glob("0*.npy")) for x in np.load(file)])
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    weights = trained(task.model)
    average = snapshot(weights)
    optimizer = AdamWByHand([*weights.values()], CLIP)
    log = []
    for step in range(STEPS):
        rows, bits = order(SEED, step, BATCH, len(images))
        total: list[Tensor] = [torch.zeros_like(w) for w in weights.values()]
        terms = {"reconstruction": 0.0, "gram": 0.0}
        for start in range(0, BATCH, PART):
            pairs = [(rows[k], bits[k]) for k in range(start, start + PART)]
            x = torch.stack([images[row].flip(-1) if bit % 2 else images[row] for row, bit in pairs]) / 255
            features = task.encoder((x - mean) / std)
            prior = task.model.projector(features)
            values = {
                "reconstruction": (task.model.decoder(prior) - features).square().mean(),
                "gram": (gram(prior) - gram(reference(features, x, str(run.upsampler)))).square().mean(),
            }
            loss = REPRESENTATION * values["reconstruction"] + GRAM * values["gram"]
            for sum_, g in zip(total, gradients_of(loss, [*weights.values()], BATCH // PART), strict=True):
                sum_ += g
            terms = {name: terms[name] + value.item() * PART / BATCH for name, value in values.items()}
        lr = learning_rate(step)
        norm = optimizer.step(total, lr)
        average = averaged(average, weights)
        loss_ = REPRESENTATION * terms["reconstruction"] + GRAM * terms["gram"]
        log.append({"loss": loss_, **terms, "grad_norm": norm, "lr": lr})
    return snapshot(weights), average, log


@pytest.mark.parametrize("upsampler", ["bilinear", "jbu"])
def test_three_steps_are_those_of_the_formulas(run: RefinerRun, tmp_path: Path, upsampler: Any) -> None:
    run = replace(run, upsampler=upsampler)
    task = RefinerTask(run)
    shaken(task.model)
    weights, average, expected = by_hand(copy.deepcopy(task), run)
    open_run(tmp_path / "run", run)
    fit(task, tmp_path / "run", run.optim, run.loop, quiet=True)
    log = read_log(tmp_path / "run")
    for line, other in zip(log, expected, strict=True):
        ours = {name.removeprefix("refiner/"): value for name, value in line.items()}
        assert {name: ours[name] for name in other} == pytest.approx(other, rel=1e-6)  # the log is float32
    assert_equal(trained(task.model), weights)
    assert_equal(load_file(checkpoint_path(tmp_path / "run", STEPS) / "model.safetensors"), average)
    norms = [line["refiner/grad_norm"] for line in log]
    assert min(norms) < CLIP < max(norms), norms
