"""The cosine term where a generator starts: at velocity 0 its slope is known and finite."""

from __future__ import annotations

import torch

from openpae.objective.flow import velocity_loss


def test_the_slope_at_no_velocity_is_that_of_a_length_of_a_tenth() -> None:
    """cos = v u / max(|v|, 0.1) with u of length 1, so that its gradient at 0 is 10 u, of each token."""
    x_1, x_0 = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    v = torch.zeros(2, 5, 3, 4, requires_grad=True)
    _, cosine = velocity_loss(v, x_1, x_0)
    (slope,) = torch.autograd.grad(cosine, v)
    target = x_1 - x_0
    unit = target / target.norm(dim=1, keepdim=True)
    torch.testing.assert_close(slope, -unit / 0.1 / (2 * 3 * 4), rtol=1e-5, atol=1e-7)


def test_velocities_longer_than_a_tenth_are_not_touched() -> None:
    x_1, x_0, v = (torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(3))
    target = x_1 - x_0
    expected = (1 - (v * target).sum(dim=1) / v.norm(dim=1) / target.norm(dim=1)).mean()
    torch.testing.assert_close(velocity_loss(v, x_1, x_0)[1].double(), expected, rtol=1e-5, atol=1e-6)
