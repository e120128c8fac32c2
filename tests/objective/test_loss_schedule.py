"""What changes over the training: the ramp of the weights, MCR's angles, LPIPS' network and its shift."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.models.lpips import LPIPS
from openpae.objective.settings import TokenizerLoss
from openpae.objective.terms import image_terms
from openpae.runtime.draws import Draws
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask

RAMPED = ("lpips", "ssr", "mcr", "scr")


def a_task(packed: PackedImages, **loss: Any) -> TokenizerTask:
    """A tiny tokenizer with LPIPS and MCR, ten steps long."""
    run = configs.load(TokenizerRun, "tokenizer/tiny")
    off = {"gan": 0.0, "ssr": 0.0, "scr": 0.0, "lpips_net": "random"}
    return TokenizerTask(
        dataclasses.replace(
            run,
            prior=None,
            data=dataclasses.replace(run.data, images=packed.shards.folder),
            loss=TokenizerLoss(**(off | loss)),
            loop=dataclasses.replace(run.loop, steps=10, global_batch_size=4, save_every=10),
        )
    )


def logs_of(task: TokenizerTask, step: int) -> dict[str, float]:
    batch = next(iter(task.batches(range(step, step + 1))))
    draws = Draws(0, step, range(4), 4, torch.device("cpu"))
    (update,) = task.updates(batch, draws, step)
    return {"loss": float(update.loss.detach())} | {name: float(value) for name, value in update.logs.items()}


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_by_default_nothing_changes_over_the_training(progress: float) -> None:
    loss = TokenizerLoss()
    assert loss.weights_at(progress) == loss.weights
    assert loss.angles_at(progress) == loss.mcr_angles


def test_the_ramp_rises_by_a_constant_factor_and_keeps_the_ratio() -> None:
    loss = TokenizerLoss(ramp=(0.2, 0.6), ramp_from=0.04)
    for progress, factor in [(0.0, 0.04), (0.2, 0.04), (0.4, 0.2), (0.6, 1.0), (1.0, 1.0)]:
        weights = loss.weights_at(progress)
        for name in RAMPED:
            assert weights[name] == pytest.approx(getattr(loss, name) * factor, rel=1e-12)
        assert {name: weights[name] for name in ("l1", "gan", "kl")} == {"l1": 1.0, "gan": 0.5, "kl": 0.0}


def test_a_ramp_without_length_is_a_step() -> None:
    loss = TokenizerLoss(ramp=(0.5, 0.5), ramp_from=0.1)
    assert loss.weights_at(0.49)["scr"] == pytest.approx(0.1)
    assert loss.weights_at(0.5)["scr"] == 1.0


def test_the_angles_rise_from_mcr_start() -> None:
    loss = TokenizerLoss(mcr_start=0.2, mcr_angle_ramp=0.5)
    assert loss.angles_at(0.1) == loss.angles_at(0.2) == (0.0, 0.0)
    assert loss.angles_at(0.45) == pytest.approx((21.25, 42.5))
    assert loss.angles_at(0.7) == pytest.approx(loss.mcr_angles)
    assert loss.angles_at(1.0) == loss.mcr_angles


def test_weights_and_angles_arrive_in_the_update(packed: PackedImages) -> None:
    """At step 5 of 10: the loss is the sum of its terms times the weights of half the training."""
    task = a_task(packed, ramp=(0.0, 1.0), ramp_from=0.01, mcr_angle_ramp=1.0)
    start, middle = logs_of(task, 0), logs_of(task, 5)
    assert start["mcr"] == pytest.approx(0, abs=1e-5)  # z twice, once to the sphere and back
    assert start["loss"] == pytest.approx(start["l1"] + 0.01 * start["lpips"])
    assert middle["loss"] == pytest.approx(middle["l1"] + 0.1 * (middle["lpips"] + 0.5 * middle["mcr"]))
    assert 0 < middle["angle_m"] < middle["angle_l"] < 60


def test_a_shift_repeats_the_border_and_moves_image_and_decode_alike() -> None:
    """LPIPS sees the images as if their first column and row were there x and y times more."""
    torch.manual_seed(0)
    loss, lpips = TokenizerLoss(), LPIPS("alex")
    x, decoded = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)

    def moved(images: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.arange(-2, 32).clamp_min(0), torch.arange(-3, 32).clamp_min(0)
        return images[:, :, rows][:, :, :, columns]

    seen = image_terms(x, {"r": decoded}, lpips, loss, (3, 2))
    torch.testing.assert_close(seen["lpips"], lpips(moved(decoded), moved(x)).mean())
    plain = image_terms(x, {"r": decoded}, lpips, loss)
    assert seen["l1"] == plain["l1"]
    assert seen["lpips"] != plain["lpips"]
    assert image_terms(x, {"r": x}, lpips, loss, (3, 2))["lpips"] == 0


def test_a_shift_is_the_same_for_all_rows_and_within_its_bound() -> None:
    device = torch.device("cpu")
    drawn = [Draws(0, step, range(8), 8, device).integers("lpips shift", 4, 2) for step in range(100)]
    part = [Draws(0, step, range(4, 6), 8, device).integers("lpips shift", 4, 2) for step in range(100)]
    assert drawn == part
    assert {number for pair in drawn for number in pair} == {0, 1, 2, 3}


def test_the_shift_reaches_lpips_alone(packed: PackedImages) -> None:
    cpu = torch.device("cpu")
    step = next(s for s in range(10) if any(Draws(0, s, range(4), 4, cpu).integers("lpips shift", 4, 2)))
    plain, moved = logs_of(a_task(packed), step), logs_of(a_task(packed, lpips_shift=3), step)
    assert moved["l1"] == plain["l1"]
    assert moved["lpips"] != plain["lpips"]


def test_the_late_network_takes_over_at_its_start(packed: PackedImages) -> None:
    task = a_task(packed, lpips_late_net="random", lpips_late_start=0.5)
    assert task.late_lpips is not None
    early, late = (logs_of(task, step)["lpips"] for step in (4, 5))
    with torch.no_grad():
        for head in task.late_lpips.heads:
            head.mul_(2)
    assert logs_of(task, 4)["lpips"] == early
    assert logs_of(task, 5)["lpips"] == pytest.approx(2 * late)
    assert a_task(packed).late_lpips is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ramp": (0.6, 0.2)}, r"loss.ramp must be \(begin, end\), begin <= end"),
        ({"ramp": (0.0, 1.5)}, r"loss.ramp must lie in \[0, 1\]"),
        ({"ramp_from": 0.0}, r"loss.ramp_from must lie in \(0, 1\]"),
        ({"ramp_from": 1.1}, r"loss.ramp_from must lie in \(0, 1\]"),
        ({"mcr_angle_ramp": -0.1}, r"loss.mcr_angle_ramp must lie in \[0, 1\]"),
        ({"lpips_shift": -1}, "loss.lpips_shift must be >= 0, got -1"),
        ({"lpips_late_start": 2.0}, r"loss.lpips_late_start must lie in \[0, 1\]"),
    ],
)
def test_values_out_of_range_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerLoss(**changes)
