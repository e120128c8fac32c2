"""Solvers on flows with known solutions: order, evaluated positions, marginals."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openpae.objective.flow import LAST_STEP, noisy_grid, time_grid
from openpae.sampling.solvers import (
    Field,
    adams,
    euler,
    euler_maruyama,
    heun,
    multistep,
    runge_kutta,
    with_breaks,
)

Solver = Callable[[Field, Tensor, Tensor], Tensor]
ORDERS = {euler: 1, heun: 2, multistep: 2, adams: 3}
MEAN, STD = 1.5, 0.6
shifts = st.floats(0.2, 5)


def to_gaussian(x: Tensor, t: float) -> Tensor:
    """Velocity E[x_1 - x_0 | x_t] where data are N(MEAN, STD^2). Its flow takes x_0 to MEAN + STD x_0."""
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def start() -> Tensor:
    return torch.linspace(-3, 3, 13, dtype=torch.float64).view(1, 1, 1, 13)


@pytest.mark.parametrize("solve", ORDERS)
@given(points=st.integers(2, 12), shift=shifts)
def test_straight_lines_are_followed_exactly(solve: Solver, points: int, shift: float) -> None:
    x_0, x_1 = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    x = solve(lambda x, t: x_1 - x_0, x_0, time_grid(points, shift))
    torch.testing.assert_close(x, x_1, atol=1e-5, rtol=1e-5)


@given(points=st.integers(3, 12), shift=shifts)
def test_the_second_order_solvers_are_exact_for_a_velocity_linear_in_t(points: int, shift: float) -> None:
    """v = 2 t from 0 gives t^2; the one step of first order (multistep's first, heun's last) misses h^2."""
    grid = time_grid(points, shift)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    first, last = float(grid[1] - grid[0]), float(grid[-1] - grid[-2])
    field = lambda x, t: torch.full_like(x, 2 * t)  # noqa: E731
    assert float(multistep(field, zero, grid)) == pytest.approx(1 - first**2, abs=1e-9)
    assert float(heun(field, zero, grid)) == pytest.approx(1 - last**2, abs=1e-9)


@given(points=st.integers(3, 12), shift=shifts)
def test_the_third_order_solver_is_exact_for_a_velocity_quadratic_in_t(points: int, shift: float) -> None:
    """v = 3 t^2 from 0 gives t^3. A midpoint step misses h^3/4, the second step the parabola's part."""
    grid = time_grid(points, shift)
    x = adams(lambda x, t: torch.full_like(x, 3 * t**2), torch.zeros(1, 1, 1, 1, dtype=torch.float64), grid)
    t = grid.tolist()
    missed = (t[1] - t[0]) ** 3 / 4
    if points > 2:
        h, a = t[2] - t[1], t[1] - t[0]
        missed += 3 * (h**3 / 3 + a * h**2 / 2)  # v[i, i-1, i-2] = 3
    assert float(x) == pytest.approx(1 - missed, abs=1e-9)


@pytest.mark.parametrize("shift", [1.0, 0.4])
def test_third_order_needs_its_breaks_where_the_velocity_jumps(shift: float) -> None:
    """As guidance does: at the break itself the velocity is still that of one side."""
    breaks = (0.25, 0.7)

    def velocity(x: Tensor, t: float) -> Tensor:
        return 2 * to_gaussian(x, t) if breaks[0] <= t <= breaks[1] else to_gaussian(x, t)

    x = start()
    for begin, end, factor in ((0.0, 0.25, 1), (0.25, 0.7, 2), (0.7, 1.0, 1)):
        x = runge_kutta(lambda x, t, factor=factor: factor * to_gaussian(x, t), x, begin, end, 1e-10)  # type: ignore[misc]
    errors = []
    for steps in (80, 160, 320):
        grid = with_breaks(time_grid(steps + 1, shift), breaks)
        assert set(breaks) <= set(grid.tolist())
        assert bool((grid.diff() > 0).all())
        errors.append(float((adams(velocity, start(), grid, breaks) - x).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(3, abs=0.3)
    unbroken = adams(velocity, start(), time_grid(321, shift))
    assert errors[-1] < 0.01 * float((unbroken - x).abs().max())


@pytest.mark.parametrize("shift", [1.0, 0.4])
@pytest.mark.parametrize(("solve", "order"), ORDERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_error_falls_with_the_order_of_the_solver(solve: Solver, order: int, shift: float) -> None:
    exact = MEAN + STD * start()
    errors = [
        float((solve(to_gaussian, start(), time_grid(steps + 1, shift)) - exact).abs().max())
        for steps in (160, 320, 640)
    ]
    assert errors[-1] < (0.01 if order == 1 else 1e-4)
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_the_adaptive_reference_meets_its_tolerance_and_the_others_converge_to_it() -> None:
    exact = MEAN + STD * start()
    reference = runge_kutta(to_gaussian, start(), 0.0, 1.0, 1e-9)
    assert reference.dtype == torch.float64
    torch.testing.assert_close(reference, exact, atol=1e-8, rtol=0)
    half = runge_kutta(to_gaussian, start(), 0.0, 0.4, 1e-9)
    torch.testing.assert_close(runge_kutta(to_gaussian, half, 0.4, 1.0, 1e-9), exact, atol=1e-8, rtol=0)
    for solve in (heun, multistep):
        x = solve(to_gaussian, start(), time_grid(301, 0.4))
        torch.testing.assert_close(x, reference, atol=1e-3, rtol=0)


def test_the_adaptive_reference_raises_if_it_stops_early() -> None:
    with pytest.raises(FloatingPointError, match=r"RK45 stopped between t = 0 and 1: .*step size"):
        runge_kutta(lambda x, t: torch.full_like(x, abs(t - 0.5) ** -1.5), start(), 0.0, 1.0, 1e-6)


@pytest.mark.parametrize(
    ("solve", "visited"),
    [(euler, lambda grid: grid[:-1]), (multistep, lambda grid: grid[:-1])],
    ids=["euler", "multistep"],
)
def test_one_evaluation_a_step_at_the_position_before_it(
    solve: Solver, visited: Callable[[Tensor], Tensor]
) -> None:
    seen: list[float] = []
    grid = time_grid(5, 0.4)
    solve(lambda x, t: seen.append(t) or torch.zeros_like(x), torch.zeros(3, 1, 1, 1), grid)  # type: ignore[func-returns-value]
    assert seen == visited(grid).tolist()


def test_heun_never_evaluates_the_velocity_at_the_data() -> None:
    seen: list[float] = []
    grid = time_grid(4, 1.0).tolist()
    heun(lambda x, t: seen.append(t) or torch.zeros_like(x), torch.zeros(3, 1, 1, 1), time_grid(4, 1.0))  # type: ignore[func-returns-value]
    assert seen == [grid[0], grid[1], grid[1], grid[2], grid[2]]


@pytest.mark.parametrize("solve", ORDERS)
def test_the_path_keeps_the_precision_of_the_noise(solve: Solver) -> None:
    """A velocity in bfloat16 must not round x."""
    for dtype in (torch.float32, torch.float64):
        x = solve(
            lambda x, t: torch.ones_like(x).bfloat16(),
            torch.full((1, 1, 1, 1), 1e-4, dtype=dtype),
            time_grid(4, 1.0),
        )
        assert x.dtype == dtype
        assert float(x) == pytest.approx(1.0001, abs=1e-6)


def moments_of_the_scheme(grid: list[float]) -> tuple[float, float]:
    """Mean and variance of the Euler-Maruyama scheme on Gaussian data. Every step is linear in x.

    Drift v + g s and noise sqrt(2 g h), with v and s from mean and variance of x_t."""
    mean, variance = 0.0, 1.0
    steps = [(t, t_next - t, True) for t, t_next in pairwise(grid)]
    for t, h, noisy in [*steps, (1 - LAST_STEP, LAST_STEP, False)]:
        spread = t**2 * STD**2 + (1 - t) ** 2
        g = (1 - t) / t
        slope = (t * STD**2 - (1 - t)) / spread - g / spread  # of v and of g s in x
        mean = mean + h * (MEAN + slope * (mean - t * MEAN))
        variance = variance * (1 + h * slope) ** 2 + (2 * g * h if noisy else 0.0)
    return mean, variance


@pytest.mark.parametrize(("steps", "shift"), [(249, 1.0), (249, 0.4), (100, 0.4)])
def test_the_sde_has_the_marginals_of_its_scheme_and_of_the_data(steps: int, shift: float) -> None:
    """The moments of the scheme are exact up to chance, those of the data up to the step size. On the shifted
    grid the official last step leaves a hundredth of the path."""
    draws = torch.Generator().manual_seed(0)
    count = 40_000
    x_0 = torch.randn(1, 1, 1, count, generator=draws, dtype=torch.float64)
    grid = noisy_grid(steps + 1, shift)
    x = euler_maruyama(
        to_gaussian, x_0, grid, lambda: torch.randn(x_0.shape, generator=draws, dtype=torch.float64)
    )
    mean, variance = moments_of_the_scheme(grid.tolist())
    assert float(x.mean()) == pytest.approx(mean, abs=5 * STD / count**0.5)
    assert float(x.var()) == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert variance == pytest.approx(STD**2, rel=0.05)


def test_the_sde_draws_noise_at_every_step_but_the_last() -> None:
    seen: list[float] = []
    calls: list[int] = []
    grid = noisy_grid(4, 0.4)

    def noise() -> Tensor:
        calls.append(len(seen))
        return torch.zeros(2, 1, 1, 1)

    euler_maruyama(lambda x, t: seen.append(t) or torch.zeros_like(x), torch.ones(2, 1, 1, 1), grid, noise)  # type: ignore[func-returns-value]
    assert seen == pytest.approx([*grid[:-1].tolist(), 0.996])
    assert calls == [1, 2, 3]


def test_the_sde_follows_the_official_formula() -> None:
    """One noisy step and the last, with v = 0.3 x + 1 in numpy: score (t v - x) / (1 - t), SBDM diffusion."""
    x_0, n = np.array([-1.0, 0.5, 2.0]), np.array([0.3, -1.0, 0.7])

    def mean_step(x: np.ndarray, t: float, h: float) -> np.ndarray:
        v = 0.3 * x + 1
        return x + h * (v + (1 - t) / t * (t * v - x) / (1 - t))

    t, t_next = 0.2, 0.7
    x = mean_step(x_0, t, t_next - t) + np.sqrt(2 * (1 - t) / t * (t_next - t)) * n
    expected = mean_step(x, 0.996, 0.004)
    actual = euler_maruyama(
        lambda x, t: 0.3 * x + 1,
        torch.from_numpy(x_0).view(1, 1, 1, 3),
        torch.tensor([t, t_next], dtype=torch.float64),
        lambda: torch.from_numpy(n).view(1, 1, 1, 3),
    )
    np.testing.assert_allclose(actual.flatten().numpy(), expected, rtol=1e-12)
