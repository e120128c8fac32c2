"""The path between noise and data, and its loss (Sec. 4 of arXiv:2605.07915).

Position t: 0 = noise, 1 = data. All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# A generator starts at velocity 0, where a cosine has slope 1 / eps. At PyTorch's 1e-8 the first gradient is
# 1e8 times too large, and Adam's second moment (0.95 a step) needs hundreds of steps to forget it. Trained
# velocities are about 60 times longer than this.
_SHORTEST = 0.1

LAST_STEP = 0.004
"""The SDE's last step, which adds no noise: evaluated at 1 - LAST_STEP, as in the authors' code."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, h, w), t (B,)) -> velocity (B, C, h, w)."""


def interpolate(x_1: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """The straight path between noise x_0 and data x_1: x_t = t x_1 + (1 - t) x_0.

    Args:
        x_1: data, (B, C, h, w).
        x_0: noise, (B, C, h, w).
        t: positions, (B,), in [0, 1].
    """
    t = t.view(-1, *[1] * (x_1.ndim - 1))
    return t * x_1 + (1 - t) * x_0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move positions towards noise (shift < 1) or data (shift > 1): t' = s t / (1 + (s - 1) t).

    0 and 1 are fixed points. The paper trains with s = 0.7 and samples with s = 0.4.

    Raises:
        ValueError: shift is not positive.
    """
    if shift <= 0:
        raise ValueError(f"shift must be > 0 (1 changes nothing), got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def dimension_shift(latent_shape: tuple[int, int, int]) -> float:
    """The shift of positions for latents of many dimensions (Sec. 4.2 of arXiv:2510.11690).

        s = sqrt(4096 / (C h w))

    Noise of one level hides less in more dimensions, so positions move towards noise. RAE counts positions
    from data (0) to noise (1) and shifts by 1 / s; counted from noise, that is `shift_time` by s.

    Args:
        latent_shape: (C, h, w).
    """
    return math.sqrt(4096 / math.prod(latent_shape))


def training_times(normal: Tensor, shift: float) -> Tensor:
    """Positions to train at: logit-normal(0, 1), then shifted.

    Args:
        normal: standard normal draws, any shape.
        shift: see `shift_time`.
    """
    return shift_time(torch.sigmoid(normal), shift)


def velocity_loss(velocity: Tensor, x_1: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the generator's loss, added 1:1: mean squared error and cosine distance.

        L = mean (v - (x_1 - x_0))^2 + mean_tokens (1 - cos(v, x_1 - x_0))

    Args:
        velocity: predicted, (B, C, h, w).
        x_1: data, (B, C, h, w), constant.
        x_0: noise, (B, C, h, w), constant.

    Returns:
        (mse, cosine): scalars; cosine in [0, 2], over the C channels of each token. A velocity shorter than
        0.1 counts as one of length 0.1, which keeps the initial slope finite.
    """
    target = (x_1 - x_0).float()
    velocity = velocity.float()
    mse = (velocity - target).square().mean()
    cosine = (1 - F.cosine_similarity(velocity, target, dim=1, eps=_SHORTEST)).mean()
    return mse, cosine


def time_grid(points: int, shift: float) -> Tensor:
    """Positions from 0 to 1 that an ODE solver visits: (points,), float64; points - 1 steps.

    Raises:
        ValueError: fewer than two points.
    """
    if points < 2:
        raise ValueError(f"a time grid needs at least 2 points (1 step), got {points}")
    return shift_time(torch.linspace(0, 1, points, dtype=torch.float64), shift)


def noisy_grid(points: int, shift: float) -> Tensor:
    """Positions that the SDE solver visits: (points,), float64; points - 1 steps, and a last step to 1.

    The authors' grid: `points` even positions from 1e-5 (at 0 the diffusion is infinite) to 1 - LAST_STEP,
    then shifted.

    Raises:
        ValueError: fewer than two points.
    """
    if points < 2:
        raise ValueError(f"a time grid needs at least 2 points (1 step), got {points}")
    return shift_time(torch.linspace(1e-5, 1 - LAST_STEP, points, dtype=torch.float64), shift)


def guide(velocity: Tensor, worse: Tensor, guidance: float) -> Tensor:
    """Guidance on all channels, away from a worse velocity: v_worse + w (v - v_worse); w = 1 gives v.

    Worse is the velocity of the null class (classifier-free guidance) or that of a smaller or less trained
    generator (AutoGuidance, arXiv:2406.02507).
    """
    return worse + guidance * (velocity - worse)


def score(velocity: Tensor, x: Tensor, t: float) -> Tensor:
    """Gradient of the log density at position t, from the velocity there.

        s = (t v - x) / (1 - t)

    For x_t = t x_1 + (1 - t) x_0 with normal x_0 the score is -E[x_0 | x_t] / (1 - t), and x_t - t v is
    E[x_0 | x_t], because v = E[x_1 - x_0 | x_t].

    Args:
        velocity: v, (B, C, h, w).
        x: x_t, (B, C, h, w).
        t: position, in [0, 1).
    """
    return (t * velocity - x) / (1 - t)


def diffusion(t: float) -> float:
    """Diffusion coefficient of the SDE: g(t) = (1 - t) / t, the SBDM form on this path.

    The SDE dx = (v + g s) dt + sqrt(2 g) dW has the densities of the ODE dx = v dt for every g >= 0. This g
    is that of the score-based SDE (arXiv:2011.13456) whose forward process walks the path backwards, as in
    SiT (arXiv:2401.08740): g = sigma^2 a'/a - sigma sigma' with a = t, sigma = 1 - t.

    Args:
        t: position, in (0, 1]. It is infinite at 0.
    """
    return (1 - t) / t
