"""The straight path: its ends, its velocity, its score, and the grids on it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openpae.objective.flow import (
    diffusion,
    dimension_shift,
    guide,
    interpolate,
    noisy_grid,
    score,
    shift_time,
    time_grid,
    training_times,
    velocity_loss,
)

shifts = st.floats(0.05, 20)


def test_the_path_starts_at_noise_and_ends_at_data() -> None:
    x_1, x_0 = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    x_t = interpolate(x_1, x_0, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], x_0[0])
    assert torch.equal(x_t[1], x_1[1])
    torch.testing.assert_close(x_t[2], 0.25 * x_1[2] + 0.75 * x_0[2])


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    x_1, x_0 = torch.randn(2, 4, 2, 2).double(), torch.randn(2, 4, 2, 2).double()
    t, h = torch.rand(2).double(), 1e-3
    slope = (interpolate(x_1, x_0, t + h) - interpolate(x_1, x_0, t - h)) / (2 * h)
    torch.testing.assert_close(slope, x_1 - x_0)


@given(shift=shifts)
def test_shifting_keeps_order_and_ends(shift: float) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_time(t, shift)
    assert shifted[0] == 0
    assert shifted[-1] == pytest.approx(1, abs=1e-12)
    assert (shifted.diff() > 0).all()
    torch.testing.assert_close(shift_time(shifted, 1 / shift), t)
    assert bool((shifted <= t + 1e-12).all()) == (shift <= 1)


def test_shifting_is_the_formula_of_the_paper() -> None:
    t = torch.rand(9, dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 0.4), 0.4 * t / (1 - 0.6 * t))


@given(m=st.integers(1, 64), t=st.floats(0, 1))
def test_the_shift_by_dimension_is_raes_seen_from_the_noise(m: int, t: float) -> None:
    """RAE: t = 1 is noise, t' = a t / (1 + (a - 1) t), a = sqrt(dimensions / 4096)."""
    a = math.sqrt(m * 16 * 16 / 4096)
    theirs = a * t / (1 + (a - 1) * t)
    ours = shift_time(torch.tensor(1 - t, dtype=torch.float64), dimension_shift((m, 16, 16)))
    assert ours.item() == pytest.approx(1 - theirs, abs=1e-12)


def test_the_shift_of_raes_own_latents() -> None:
    """768 x 16 x 16 dimensions of DINOv2-B: a = sqrt(48)."""
    assert dimension_shift((768, 16, 16)) == pytest.approx(1 / math.sqrt(48))
    assert dimension_shift((16, 16, 16)) == 1


def test_training_positions_are_logit_normal() -> None:
    """The median of sigmoid(n) is 1/2, of its shift s / (1 + s); a logit is shifted by log s."""
    normal = torch.randn(20_000)
    t = training_times(normal, 0.7)
    assert t.min() > 0
    assert t.max() < 1
    assert t.median() == pytest.approx(0.7 / 1.7, abs=0.01)
    torch.testing.assert_close(torch.logit(t), normal + math.log(0.7), atol=1e-3, rtol=1e-3)


def test_loss_is_zero_for_the_true_velocity_only() -> None:
    x_1, x_0 = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    mse, cosine = velocity_loss(x_1 - x_0, x_1, x_0)
    assert mse == 0
    assert cosine.abs() < 1e-6
    mse, cosine = velocity_loss(x_0 - x_1, x_1, x_0)
    torch.testing.assert_close(mse, 4 * (x_1 - x_0).square().mean())
    assert cosine == pytest.approx(2, abs=1e-6)
    mse, cosine = velocity_loss(3 * (x_1 - x_0), x_1, x_0)
    assert cosine.abs() < 1e-6 < mse  # direction is right, length is not


def test_cosine_runs_over_the_channels_of_each_token() -> None:
    target = torch.zeros(1, 2, 1, 2)
    target[0, 0] = 1.0
    wrong_at_one = target.clone()
    wrong_at_one[0, :, 0, 1] = torch.tensor([0.0, 5.0])
    _, cosine = velocity_loss(wrong_at_one, target, torch.zeros_like(target))
    assert cosine == pytest.approx(0.5)


def test_loss_of_half_precision_is_computed_in_full() -> None:
    x_1, x_0 = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    mse, cosine = velocity_loss(torch.randn(3, 8, 4, 4).bfloat16(), x_1, x_0)
    assert mse.dtype == cosine.dtype == torch.float32


@given(points=st.integers(2, 300), shift=shifts)
def test_a_time_grid_runs_from_noise_to_data(points: int, shift: float) -> None:
    grid = time_grid(points, shift)
    assert grid.shape == (points,)
    assert grid.dtype == torch.float64
    assert grid[0] == 0
    assert grid[-1] == pytest.approx(1)
    assert (grid.diff() > 0).all()


def test_guidance_is_linear_and_one_is_none() -> None:
    c, u = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guide(c, u, 1.0), c)
    torch.testing.assert_close(guide(c, u, 0.0), u)
    torch.testing.assert_close(guide(c, u, 2.5), 2.5 * c - 1.5 * u)


def test_the_noisy_grid_is_the_authors() -> None:
    plain, shifted = noisy_grid(250, 1.0), noisy_grid(250, 0.4)
    torch.testing.assert_close(plain, torch.from_numpy(np.linspace(1e-5, 0.996, 250)))
    torch.testing.assert_close(shifted, 0.4 * plain / (1 - 0.6 * plain))
    assert len(shifted) == 250
    assert shifted[-1] == pytest.approx(0.3984 / 0.4024)


def gaussian(t: float, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance of x_t where data are N(mean, std^2)."""
    return t * mean, t**2 * std**2 + (1 - t) ** 2


@given(t=st.floats(0, 0.99), mean=st.floats(-3, 3), std=st.floats(0.1, 3))
def test_the_score_is_that_of_a_gaussian(t: float, mean: float, std: float) -> None:
    """With Gaussian data both are known: v = E[x_1 - x_0 | x_t] by regression, s = -(x - mean) / variance."""
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    centre, variance = gaussian(t, mean, std)
    v = mean + (t * std**2 - (1 - t)) / variance * (x - centre)
    torch.testing.assert_close(score(v, x, t), -(x - centre) / variance, atol=1e-8, rtol=1e-8)


@given(t=st.floats(0.01, 0.99))
def test_the_diffusion_undoes_the_forward_process(t: float) -> None:
    """The SBDM form: dx = (a'/a) x dt + sqrt(2 g) dW backwards in time has the variance of the path.

    Along the path, d(sigma^2)/dt = 2 (a'/a) sigma^2 - 2 g, by differences in float64.
    """
    h = 1e-6
    rate = ((1 - t - h) ** 2 - (1 - t + h) ** 2) / (2 * h)
    assert rate == pytest.approx(2 / t * (1 - t) ** 2 - 2 * diffusion(t), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_that_is_not_positive_is_rejected(shift: float) -> None:
    with pytest.raises(ValueError, match=rf"shift must be > 0 \(1 changes nothing\), got {shift}"):
        shift_time(torch.rand(2), shift)


@pytest.mark.parametrize("grid", [time_grid, noisy_grid])
def test_a_grid_of_one_point_is_rejected(grid: Callable[[int, float], torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 points \(1 step\), got 1"):
        grid(1, 1.0)
