"""When a gradient norm counts as a spike: from the 21st step on, against the mean of those before."""

from __future__ import annotations

import pytest
import torch

from openpae.engine.health import NonFiniteGuard
from openpae.engine.settings import LoopConfig, OptimConfig

LOOP = LoopConfig(steps=1, global_batch_size=1, device="cpu")


def skipped(norms: list[float], factor: float = 3.0) -> list[bool]:
    """Whether each step is skipped."""
    health = NonFiniteGuard(LOOP, OptimConfig(lr=1.0, spike_factor=factor), torch.device("cpu"))
    flags = [health.check_gradient(step, "player", torch.tensor(norm)) for step, norm in enumerate(norms)]
    return [bool(flag) for flag in flags]


@pytest.mark.parametrize(("known", "expected"), [(0, False), (19, False), (20, True), (21, True)])
def test_a_spike_is_skipped_once_twenty_steps_are_known(known: int, expected: bool) -> None:
    assert skipped([1.0] * known + [10.0]) == [False] * known + [expected]


def test_the_limit_is_the_factor_times_the_mean_so_far() -> None:
    """Norms 1 ... 20 have the mean 10.5; three times that is the limit, which itself passes."""
    norms = [float(n) for n in range(1, 21)]
    assert skipped([*norms, 31.4])[-1] is False
    assert skipped([*norms, 31.6])[-1] is True


def test_players_have_means_of_their_own() -> None:
    health = NonFiniteGuard(LOOP, OptimConfig(lr=1.0, spike_factor=3.0), torch.device("cpu"))
    for step in range(20):
        health.check_gradient(step, "large", torch.tensor(100.0))
        health.check_gradient(step, "small", torch.tensor(1.0))
    assert not health.check_gradient(20, "large", torch.tensor(100.0))
    assert health.check_gradient(20, "small", torch.tensor(100.0))


def test_the_mean_follows_a_level_that_rises() -> None:
    """Each spike counts as the limit, so a level five times as high is taken after some steps, not never."""
    flags = skipped([1.0] * 20 + [5.0] * 200)
    assert flags[20]
    assert not flags[-1]
