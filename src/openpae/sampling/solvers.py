"""Solvers that follow a velocity from noise (t = 0) to data (t = 1), one pure function each.

Positions are Python floats, so that no step waits for the device. x keeps the precision of x_0, whatever
that of the velocity. `sampling/__init__` says where a new solver is registered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae.objective.flow import LAST_STEP, diffusion, score
from openpae.runtime.extras import needs

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
    for t, t_next in pairwise(times.tolist()):
        x = x + (t_next - t) * velocity(x, t).to(x.dtype)
    return x


def heun(velocity: Field, x_0: Tensor, times: Tensor) -> Tensor:
    """Follow dx/dt = v(x, t) by Heun's steps: second order, two evaluations a step.

        x' = x + h v(x, t_i);   x <- x + h/2 (v(x, t_i) + v(x', t_{i+1}))

    The last step is an Euler step, as in EDM (arXiv:2206.00364): no generator is trained at the data itself,
    t = 1. One first-order step keeps the method at second order.

    Args:
        velocity: v.
        x_0: noise, (B, C, h, w), float32 or float64.
        times: positions on the CPU, (T,); T - 1 steps.

    Returns:
        x at times[-1], (B, C, h, w).
    """
    x, last = x_0, len(times) - 2
    for number, (t, t_next) in enumerate(pairwise(times.tolist())):
        v = velocity(x, t).to(x.dtype)
        if number < last:
            v = (v + velocity(x + (t_next - t) * v, t_next).to(x.dtype)) / 2
        x = x + (t_next - t) * v
    return x


def multistep(velocity: Field, x_0: Tensor, times: Tensor) -> Tensor:
    """Follow dx/dt = v(x, t) by a method after DPM-Solver++(2M): second order, one evaluation a step.

    A step from s to t needs x_t = x_s + integral_s^t v du. DPM-Solver++ (arXiv:2211.01095) extrapolates the
    predicted data D = x + (1 - u) v linearly from its last two values, over the log signal-to-noise ratio
    log(u / (1 - u)). That ratio is infinite at both ends of this path, where published code falls back to
    first order. Our choice: extrapolate v over u, which needs no exception at either end. With p the position
    before s:

        x <- x + (t - s) v_s + (t - s)^2 / 2  (v_s - v_p) / (s - p)

    The first step has no v_p and is an Euler step. On trained generators the error is half that of
    extrapolating D, over u or over the ratio (docs/results.md).

    Args:
        velocity: v.
        x_0: noise, (B, C, h, w), float32 or float64.
        times: positions on the CPU, (T,); T - 1 steps.

    Returns:
        x at times[-1], (B, C, h, w).
    """
    x = x_0
    before: tuple[float, Tensor] | None = None
    for t, t_next in pairwise(times.tolist()):
        v = velocity(x, t).to(x.dtype)
        x = x + (t_next - t) * v
        if before is not None:
            x = x + (t_next - t) ** 2 / 2 / (t - before[0]) * (v - before[1])
        before = (t, v)
    return x


def adams(velocity: Field, x_0: Tensor, times: Tensor, breaks: Collection[float] = ()) -> Tensor:
    """Follow dx/dt = v(x, t) by the Adams-Bashforth method of third order, one evaluation a step.

    A step integrates the parabola through the last three velocities, at unequal distances. With h = t_{i+1} -
    t_i, a = t_i - t_{i-1} and Newton's divided differences v[.]:

        x <- x + h v_i + h^2/2 v[i, i-1] + (h^3/3 + a h^2/2) v[i, i-1, i-2]

    The first step, and the first after a break, has no earlier velocity and is a midpoint step, with two
    evaluations. The second has one earlier velocity and leaves out the last term.

    Args:
        velocity: v.
        x_0: noise, (B, C, h, w), float32 or float64.
        times: positions on the CPU, (T,), among them the breaks, as `with_breaks` gives them; T - 1 steps.
        breaks: positions where v jumps, as guidance does where it starts or ends. No parabola crosses them.

    Returns:
        x at times[-1], (B, C, h, w).
    """
    x = x_0
    past: list[tuple[float, Tensor]] = []
    for t, t_next in pairwise(times.tolist()):
        h = t_next - t
        if t in breaks:
            past = []
        # Just after a break: at the break itself the velocity may still be that of the other side.
        v = velocity(x, after(t) if t in breaks else t).to(x.dtype)
        if not past:
            x = x + h * velocity(x + h / 2 * v, t + h / 2).to(x.dtype)
        else:
            a, slope = t - past[0][0], (v - past[0][1]) / (t - past[0][0])
            x = x + h * v + h**2 / 2 * slope
            if len(past) == 2:
                earlier = (past[0][1] - past[1][1]) / (past[0][0] - past[1][0])
                x = x + (h**3 / 3 + a * h**2 / 2) / (t - past[1][0]) * (slope - earlier)
        past = [(t, v), *past[:1]]
    return x


def with_breaks(times: Tensor, breaks: Iterable[float]) -> Tensor:
    """Move the nearest inner position onto each break. Returns float64, (T,)."""
    moved = times.double()
    for position in breaks:
        if len(moved) > 2:
            moved[1 + int((moved[1:-1] - position).abs().argmin())] = position
    return moved


def after(t: float) -> float:
    """The next position in float32, the type of positions inside the generator."""
    return float(np.nextafter(np.float32(t), np.float32(2)))


def euler_maruyama(velocity: Field, x_0: Tensor, times: Tensor, noise: Callable[[], Tensor]) -> Tensor:
    """Follow the SDE of `flow.diffusion` by Euler-Maruyama steps, and end with one that adds no noise.

        x <- x + h (v + g s) + sqrt(2 g h) n,   n ~ N(0, 1),   v, g, s at t_i,   h = t_{i+1} - t_i
        x <- x + h (v + g s),                   v, g, s at 1 - h,   h = LAST_STEP

    as in the official code. The last position of a shifted grid is not 1 - LAST_STEP; the last step is
    evaluated at 1 - LAST_STEP anyway, as in the official code (docs/deviations.md).

    Args:
        velocity: v.
        x_0: noise, (B, C, h, w), float32 or float64.
        times: positions on the CPU, (T,), above 0, as `flow.noisy_grid` gives them; T - 1 noisy steps.
        noise: each call gives a new standard normal draw with the shape and device of x_0.

    Returns:
        x after the last step, (B, C, h, w).
    """

    def drift(x: Tensor, t: float) -> Tensor:
        v = velocity(x, t).to(x.dtype)
        return v + diffusion(t) * score(v, x, t)

    x = x_0
    for t, t_next in pairwise(times.tolist()):
        h = t_next - t
        x = x + h * drift(x, t) + math.sqrt(2 * diffusion(t) * h) * noise()
    return x + LAST_STEP * drift(x, 1 - LAST_STEP)


def runge_kutta(velocity: Field, x_0: Tensor, start: float, stop: float, tolerance: float) -> Tensor:
    """Follow dx/dt = v(x, t) with SciPy's adaptive RK45 in float64. The other solvers converge to its result.

    Step sizes depend on all samples of the batch. For results that do not, call it sample by sample. Every
    evaluation waits for the device.

    Args:
        velocity: v, smooth between start and stop; split the path where guidance starts or ends.
        x_0: x at start, (B, C, h, w), float32 or float64; the velocity gets x in that precision.
        start: first position.
        stop: last position.
        tolerance: error of a step, absolute and relative.

    Returns:
        x at stop, (B, C, h, w).

    Raises:
        FloatingPointError: the solver stops early, with its reason.
    """
    with needs("eval", "solver rk45"):
        from scipy.integrate import solve_ivp

    def slope(t: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
        x = torch.from_numpy(y.reshape(x_0.shape)).to(x_0)
        out: NDArray[np.float64] = velocity(x, t).double().cpu().numpy().reshape(-1)
        return out

    y = x_0.double().cpu().numpy().reshape(-1)
    path = solve_ivp(slope, (start, stop), y, method="RK45", t_eval=(stop,), rtol=tolerance, atol=tolerance)
    if not path.success:
        raise FloatingPointError(f"RK45 stopped between t = {start:.4g} and {stop:.4g}: {path.message}")
    return torch.from_numpy(path.y[:, -1].reshape(x_0.shape)).to(x_0)
