"""Three optimizer steps of a generator, computed beside the engine: see by_hand.py for what both share."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openpae.data.shard_writer import ShardWriter
from openpae.data.shards import Layout, Shards
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.run_folder import open_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import LightningDiTConfig
from openpae.storage.model_folder import checkpoint_path
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun
from tests.by_hand import (
    BATCH,
    LOOP,
    OPTIM,
    STEPS,
    AdamWByHand,
    Drawn,
    assert_equal,
    averaged,
    double_precision,
    gradients_of,
    learning_rate,
    order,
    snapshot,
    trained,
)
from tests.conftest import shaken

SEED, PART = 5, 3
C, SIDE, CLASSES, IMAGES = 8, 4, 3, 7
CLIP = 1.6


@pytest.fixture
def cache(tmp_path: Path) -> Shards:
    """Latents of seven images and their mirrors; the channels' means and deviations are far from 0 and 1."""
    layout = Layout(
        kind="latents",
        dtype="bfloat16",
        shape=(2, C, SIDE, SIDE),
        sources=IMAGES,
        per_shard=4,
        attributes={"tokenizer": "0", "classes": ["a", "b", "c"]},
    )
    writer = ShardWriter(tmp_path / "latents", layout)
    scale, offset = torch.linspace(0.2, 3, C), torch.linspace(-4, 2, C)
    for number, labels in ((0, [2, 0, 1, 2]), (1, [0, 1, 1])):
        z = torch.randn(len(labels), 2, C, SIDE, SIDE)
        z = z * scale[:, None, None] + offset[:, None, None]
        writer.write(number, z.bfloat16(), labels)
    return writer.finish()


@pytest.fixture
def run(cache: Shards) -> GeneratorRun:
    """Nothing at its default."""
    return GeneratorRun(
        model=LightningDiTConfig(
            latent_dim=C, grid_size=SIDE, hidden_dim=32, num_layers=2, num_heads=2, num_classes=CLASSES,
            class_dropout=0.4,
        ),
        latents=cache.folder,
        times="logit-normal",
        time_shift=0.6,
        cosine=0.7,
        optim=OptimConfig(**OPTIM, clip=CLIP),
        loop=LoopConfig(**LOOP, device_batch_size=PART, seed=SEED),
    )  # fmt: skip


@pytest.fixture
def exact(cache: Shards) -> Iterator[None]:
    with double_precision():
        yield


def by_hand(
    model: Any, run: GeneratorRun
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
    """Weights, average and log of three steps."""
    raw = np.stack([z for file in ("00000", "00001") for z in np.load(run.latents / f"{file}.npy")])
    z_all = torch.from_numpy(raw).view(torch.bfloat16).double()  # (images, mirrored, C, h, w)
    labels = torch.from_numpy(np.load(run.latents / "labels.npy"))
    mean = z_all.numpy().mean(axis=(0, 1, 3, 4))[:, None, None]
    std = z_all.numpy().std(axis=(0, 1, 3, 4))[:, None, None]
    assert std.max() > 2
    weights = trained(model)
    average = snapshot(weights)
    optimizer = AdamWByHand([*weights.values()], CLIP)
    log = []
    for step in range(STEPS):
        rows, bits = order(SEED, step, BATCH, IMAGES)
        total: list[Tensor] = [torch.zeros_like(w) for w in weights.values()]
        terms = {"mse": 0.0, "cosine": 0.0}
        for part in (slice(0, PART), slice(PART, BATCH)):
            draws = Drawn(SEED, step, BATCH, part)
            z = torch.stack([z_all[row, bit % 2] for row, bit in zip(rows[part], bits[part], strict=True)])
            x_1 = (z - torch.from_numpy(mean)) / torch.from_numpy(std)
            x_0 = draws.normal("noise", C, SIDE, SIDE)
            if run.times == "uniform":
                t, s = draws.uniform("t"), math.sqrt(4096 / (C * SIDE * SIDE))
            else:
                t, s = 1 / (1 + torch.exp(-draws.normal("t"))), 0.6
            t = s * t / (1 + (s - 1) * t)
            kept = draws.uniform("class dropout") >= 0.4
            shown = torch.where(kept, labels[rows[part]], CLASSES)
            where = t[:, None, None, None]
            v, target = model(where * x_1 + (1 - where) * x_0, t, shown), x_1 - x_0
            mse = ((v - target) ** 2).mean()
            lengths = v.norm(dim=1).clamp_min(0.1) * target.norm(dim=1).clamp_min(0.1)
            cosine = (1 - (v * target).sum(dim=1) / lengths).mean()
            for sum_, g in zip(total, gradients_of(mse + 0.7 * cosine, [*weights.values()], 2), strict=True):
                sum_ += g
            terms["mse"] += mse.item() / 2
            terms["cosine"] += cosine.item() / 2
        lr = learning_rate(step)
        norm = optimizer.step(total, lr)
        average = averaged(average, weights)
        loss = terms["mse"] + 0.7 * terms["cosine"]
        log.append({"loss": loss, **terms, "grad_norm": norm, "lr": lr})
    return snapshot(weights), average, log


@pytest.mark.parametrize("changes", [{}, {"times": "uniform", "time_shift": None}], ids=["paper", "rae"])
def test_three_steps_are_those_of_the_formulas(
    run: GeneratorRun, exact: None, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = replace(run, **changes)
    task = GeneratorTask(run)
    shaken(task.model)  # a new generator's velocity is 0
    weights, average, expected = by_hand(copy.deepcopy(task.model), run)
    open_run(tmp_path / "run", run)
    fit(task, tmp_path / "run", run.optim, run.loop, quiet=True)
    log = read_log(tmp_path / "run")
    for line, other in zip(log, expected, strict=True):
        ours = {name.removeprefix("generator/"): value for name, value in line.items()}
        assert {name: ours[name] for name in other} == pytest.approx(other, rel=1e-6)  # the log is float32
    norms = [line["generator/grad_norm"] for line in log]
    assert min(norms) < CLIP < max(norms)
    assert_equal(trained(task.model), weights)
    assert_equal(load_file(checkpoint_path(tmp_path / "run", STEPS) / "model.safetensors"), average)
