"""Solvers that follow a velocity from noise (t = 0) to data (t = 1), one pure function each.

All take a grid of positions that lies on the host, so that no step waits for the device. The path is followed
in the precision of x_0, whatever that of the velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae.objective.flow import LAST_STEP, diffusion, score

Field = Callable[[Tensor, float], Tensor]
"""(x (B, C, h, w), t) -> velocity (B, C, h, w) at position t."""


def euler(velocity: Field, x_0: Tensor, times: Tensor) -> Tensor:
    """Follow dx/dt = v(x, t) by Euler steps: first order, one evaluation a step.

        x <- x + (t_{i+1} - t_i) v(x, t_i)

    Args:
        velocity: v.
        x_0: noise, (B, C, h, w), float32 or float64.
        times: positions on the CPU, (T,), as `flow.time_grid` gives them; T - 1 steps.

    Returns:
        x at times[-1], (B, C, h, w).
    """
    x = x_0
    for now, then in _steps(times):
        x = x + (then - now) * velocity(x, now).to(x.dtype)
    return x


def heun(velocity: Field, x_0: Tensor, times: Tensor) -> Tensor:
    """Follow dx/dt = v(x, t) by Heun's steps: second order, two evaluations a step.

        x' = x + h v(x, t_i);   x <- x + h/2 (v(x, t_i) + v(x', t_{i+1}))

    The last step is Euler's, so that the velocity at the data itself, where no generator is trained, is never
    asked for (as in EDM, arXiv:2206.00364): one step of first order leaves the order of the whole at two.

    Args:
        velocity: v.
        x_0: noise, (B, C, h, w), float32 or float64.
        times: positions on the CPU, (T,); T - 1 steps.

    Returns:
        x at times[-1], (B, C, h, w).
    """
    x, last = x_0, len(times) - 2
    for number, (now, then) in enumerate(_steps(times)):
        v = velocity(x, now).to(x.dtype)
        if number < last:
            v = (v + velocity(x + (then - now) * v, then).to(x.dtype)) / 2
        x = x + (then - now) * v
    return x


def multistep(velocity: Field, x_0: Tensor, times: Tensor) -> Tensor:
    """Follow dx/dt = v(x, t) in the manner of DPM-Solver++(2M): second order, one evaluation a step.

    A step from s to t needs x_t = x_s + integral_s^t v du. What can be integrated exactly is, and what the
    network says is put on a line through its last two values. DPM-Solver++ (arXiv:2211.01095) draws that line
    for the data D = x + (1 - u) v that the velocity heads for, over the log signal-to-noise ratio
    log(u / (1 - u)), and integrates v = (D - x) / (1 - u). With D constant that is Euler's step here, because
    the path is straight. But the ratio is infinite at both ends of this path, so there published code falls
    back to first order; and v is bounded up to the data, which a line for D is not (dD/du = (1 - u) dv/du).
    Our choice is the line for v over u, which has no exception at either end, with p the position before s:

        x <- x + (t - s) v_s + (t - s)^2 / 2  (v_s - v_p) / (s - p)

    The first step has no v_p and is Euler's. On trained generators its error is half that of the lines for D,
    over t or over the ratio (docs/results.md).

    Args:
        velocity: v.
        x_0: noise, (B, C, h, w), float32 or float64.
        times: positions on the CPU, (T,); T - 1 steps.

    Returns:
        x at times[-1], (B, C, h, w).
    """
    x = x_0
    before: tuple[float, Tensor] | None = None
    for now, then in _steps(times):
        v = velocity(x, now).to(x.dtype)
        x = x + (then - now) * v
        if before is not None:
            x = x + (then - now) ** 2 / 2 / (now - before[0]) * (v - before[1])
        before = (now, v)
    return x


def euler_maruyama(velocity: Field, x_0: Tensor, times: Tensor, noise: Callable[[], Tensor]) -> Tensor:
    """Follow the SDE of `flow.diffusion` by Euler-Maruyama steps, and end with one that adds no noise.

        x <- x + h (v + g s) + sqrt(2 g h) n,   n ~ N(0, 1),   v, g, s at t_i,   h = t_{i+1} - t_i
        x <- x + h (v + g s),                   v, g, s at 1 - h,   h = LAST_STEP

    as in the authors' code. On a shifted grid the last position is not 1 - LAST_STEP; the last step is
    evaluated there all the same, as theirs is (docs/deviations.md).

    Args:
        velocity: v.
        x_0: noise, (B, C, h, w), float32 or float64.
        times: positions on the CPU, (T,), above 0, as `flow.noisy_grid` gives them; T - 1 noisy steps.
        noise: standard normal draws of the shape of x_0, new ones at each call, on its device.

    Returns:
        x after the last step, (B, C, h, w).
    """

    def drift(x: Tensor, t: float) -> Tensor:
        v = velocity(x, t).to(x.dtype)
        return v + diffusion(t) * score(v, x, t)

    x = x_0
    for now, then in _steps(times):
        h = then - now
        x = x + h * drift(x, now) + math.sqrt(2 * diffusion(now) * h) * noise()
    return x + LAST_STEP * drift(x, 1 - LAST_STEP)


def runge_kutta(velocity: Field, x_0: Tensor, start: float, stop: float, tolerance: float) -> Tensor:
    """Follow dx/dt = v(x, t) with SciPy's adaptive RK45 in float64: what the others converge to.

    The steps suit the batch as a whole. For results that do not depend on the batch, call it sample by
    sample. Every evaluation waits for the device.

    Args:
        velocity: v, smooth between start and stop: split the path where guidance sets in.
        x_0: x at start, (B, C, h, w), float32 or float64; the velocity gets x in its precision.
        start: first position.
        stop: last position.
        tolerance: error that a step may make, absolute and relative.

    Returns:
        x at stop, (B, C, h, w).

    Raises:
        FloatingPointError: the solver cannot go on; its reason is given.
    """
    from scipy.integrate import solve_ivp

    def slope(t: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
        x = torch.from_numpy(y.reshape(x_0.shape)).to(x_0)
        out: NDArray[np.float64] = velocity(x, t).double().cpu().numpy().reshape(-1)
        return out

    y = x_0.double().cpu().numpy().reshape(-1)
    found = solve_ivp(slope, (start, stop), y, method="RK45", t_eval=(stop,), rtol=tolerance, atol=tolerance)
    if not found.success:
        raise FloatingPointError(f"RK45 stopped between t = {start:.4g} and {stop:.4g}: {found.message}")
    return torch.from_numpy(found.y[:, -1].reshape(x_0.shape)).to(x_0)


def _steps(times: Tensor) -> Iterator[tuple[float, float]]:
    return pairwise(times.tolist())
