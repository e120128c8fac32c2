"""The learning-rate schedule, and the ranges of the settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpae.engine.loop import fit
from openpae.engine.settings import OptimConfig, lr_at
from tests.engine.runs import LOOP, OPTIM, Tiny


@given(
    steps=st.integers(2, 400),
    warmup=st.integers(0, 100),
    lr=st.floats(1e-6, 1),
    share=st.floats(0, 1),
)
def test_the_schedule_rises_then_falls_between_its_corners(
    steps: int, warmup: int, lr: float, share: float
) -> None:
    optim = OptimConfig(lr=lr, final_lr=lr * share, warmup_steps=warmup)
    rates = [lr_at(step, optim, steps) for step in range(steps)]
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    rise, fall = np.diff(rates[: warmup + 1]), np.diff(rates[warmup:])
    assert (rise >= -1e-12).all()  # where the cosine begins, its formula rounds
    assert (fall <= 1e-12).all()
    if warmup:
        assert rates[0] == pytest.approx(lr / warmup)
    if warmup < steps:
        assert max(rates) == pytest.approx(lr)
    if warmup + 1 < steps:
        assert rates[-1] == pytest.approx(lr * share)


def test_the_schedule_without_an_end_is_constant() -> None:
    optim = OptimConfig(lr=0.5, warmup_steps=4)
    assert [lr_at(step, optim, 100) for step in (0, 1, 3, 4, 50, 99)] == [0.125, 0.25, 0.5, 0.5, 0.5, 0.5]


def test_the_middle_of_the_cosine_is_the_mean() -> None:
    optim = OptimConfig(lr=1.0, final_lr=0.2, warmup_steps=10)
    assert lr_at(60, optim, 111) == pytest.approx(0.6)


def test_the_optimizer_runs_at_the_scheduled_rate(tmp_path: Path) -> None:
    task, rates = Tiny(), []
    task.optimizers["model"].register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert rates == [lr_at(step, OPTIM, LOOP.steps) for step in range(6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "optim.lr must be > 0, got 0.0"),
        ({"lr": math.nan}, "optim.lr must be a finite number, got nan"),
        ({"lr": math.inf}, "optim.lr must be a finite number, got inf"),
        ({"final_lr": 2.0}, r"optim.final_lr must lie in \[0, 1.0\], got 2.0"),
        ({"warmup_steps": -1}, "optim.warmup_steps must be >= 0, got -1"),
        ({"betas": (0.9, 1.0)}, r"optim.betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"clip": 0.0}, "optim.clip must be > 0, got 0.0"),
        ({"clip": math.nan}, "optim.clip must be a finite number, got nan"),
    ],
)
def test_invalid_optimizer_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**({"lr": 1.0} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "loop.steps must be >= 1, got 0"),
        ({"save_every": 0}, "loop.save_every must be >= 1, got 0"),
        ({"keep_last": 0}, "loop.keep_last must be >= 1, got 0"),
        ({"seed": -1}, "loop.seed must be >= 0, got -1"),
        ({"device_batch_size": 3}, "device_batch_size must divide global_batch_size = 4, got 3"),
        ({"ema_decay": 1.0}, r"loop.ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_invalid_loop_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LOOP, **changes)
