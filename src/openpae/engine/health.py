"""Steps whose loss or gradient is not finite, or whose gradient norm is an outlier."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.runtime import processes

WARM_UP = 20
"""Steps of a player before its mean gradient norm is used."""
MEMORY = 100
"""Horizon of the mean in steps."""


class NotFinite(FloatingPointError):
    """A step is not finite. Nothing was saved after it.

    Args:
        step: number of the step.
        terms: the terms that are not finite.
        origin: the first tensor that is not finite, from `diagnosis`.
    """

    def __init__(self, step: int, terms: str, origin: str = "") -> None:
        super().__init__(
            f"training is not finite at step {step}: {terms}{origin and '; '}{origin}; "
            "nothing was saved after it: lower optim.lr, set optim.clip, or use loop.precision fp32"
        )
        self.step, self.terms = step, terms


class NonFiniteGuard:
    """Checks every loss and gradient norm, and decides which updates are skipped.

    On a CPU with `stop` or `rollback` the check is immediate. Otherwise it must not synchronise: each update
    carries a flag that makes the optimizer skip it, and the host reads the flags with the log. With `stop`
    and `rollback` a flag that is set stays set, so the weights stay as they were before the bad update until
    the step is computed again.

    All ranks decide alike: a value that is not finite on one rank counts on all.

    Args:
        loop: the policy (`on_nonfinite`, `nonfinite_limit`).
        optim: the limit of a spike (`spike_factor`).
        device: the device of the losses.
    """

    def __init__(self, loop: LoopConfig, optim: OptimConfig, device: torch.device) -> None:
        self.policy, self.limit, self.factor = loop.on_nonfinite, loop.nonfinite_limit, optim.spike_factor
        self.at_once = device.type == "cpu" and self.policy != "skip"
        self.device = device
        self.norms: dict[str, Tensor] = {}
        """(2,) for each player: number of steps, and mean gradient norm."""
        self.forget()

    def forget(self) -> None:
        """Reset all flags and means, for a rollback."""
        self.first_bad = torch.full((), math.inf, device=self.device)
        self.bad: dict[str, Tensor] = {}
        self.in_a_row: dict[str, Tensor] = {}
        self.longest = torch.zeros((), device=self.device)
        self.norms.clear()

    @property
    def may_skip(self) -> bool:
        """Whether a run may skip steps and continue; the log then counts them."""
        return self.policy == "skip" or self.factor is not None

    def check_loss(self, step: int, player: str, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Check the loss of a device batch before its backward pass.

        Raises:
            NotFinite: the loss is not finite on some rank; on a GPU `require_finite` raises it.
        """
        if self.at_once:
            self._stop_unless(loss, step, terms)
        else:
            bad = ~loss.detach().isfinite()
            self.bad[player] = self.bad[player] | bad if player in self.bad else bad

    def check_gradient(self, step: int, player: str, norm: Tensor) -> Tensor | None:
        """Check the gradient norm of an update, over all ranks, before its step.

        Returns:
            Scalar: 1 to skip the update, 0 to take it; None if every update is taken.

        Raises:
            NotFinite: as in `check_loss`.
        """
        skip: Tensor | None = None
        if self.at_once:  # a finite loss can have a gradient that is not
            self._stop_unless(norm, step, {f"{player}/grad_norm": norm})
        else:
            skip = self._skips(step, player, norm)
        if self.factor is not None:
            spike = self._is_spike(player, norm, self.factor)
            skip = spike if skip is None else torch.maximum(skip, spike)
        return skip

    def require_finite(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Read the flags of the steps up to this one; on a GPU this synchronises.

        Raises:
            NotFinite: a step was not finite, or with `skip`, too many steps in a row.
        """
        if self.at_once:
            return
        if self.policy != "skip":
            if math.isfinite(bad := self.first_bad.item()):
                raise NotFinite(int(bad), _named(terms))
        elif (longest := self.longest.item()) >= self.limit:
            raise NotFinite(step, f"{longest:.0f} steps in a row were skipped")

    def _stop_unless(self, value: Tensor, step: int, terms: Mapping[str, Tensor]) -> None:
        if processes.any_rank(not value.isfinite()):
            raise NotFinite(step, _named(terms))

    def _skips(self, step: int, player: str, norm: Tensor) -> Tensor:
        # The gradient norm is the same on all ranks; a loss may be bad on one rank only.
        bad = processes.largest_of((self.bad.pop(player) | ~norm.isfinite()).float())
        if self.policy == "skip":
            row = bad * (self.in_a_row.get(player, 0) + 1)
            self.in_a_row[player], self.longest = row, torch.maximum(self.longest, row)
            return bad
        self.first_bad = torch.minimum(self.first_bad, torch.where(bad > 0, float(step), math.inf))
        return self.first_bad.isfinite().float()

    def _is_spike(self, player: str, norm: Tensor, factor: float) -> Tensor:
        if player not in self.norms:
            self.norms[player] = torch.zeros(2, device=norm.device)
        count, mean = self.norms[player].unbind()
        known = count >= WARM_UP
        finite = norm.isfinite()
        # A spike counts as the largest norm that is no spike, so the mean follows a level that rises.
        clipped = torch.where(known, torch.minimum(norm, factor * mean), norm)
        moved = mean + (clipped - mean) / (count + 1).clamp(max=MEMORY)
        spike = (known & (norm > factor * mean)).float()
        self.norms[player] = torch.where(finite, torch.stack([count + 1, moved]), self.norms[player])
        return spike


def _named(terms: Mapping[str, Tensor]) -> str:
    """The terms that are not finite on any rank, with their values."""
    own = [f"{name} = {value.item()}" for name, value in terms.items() if not value.isfinite()]
    return (
        ", ".join(dict.fromkeys(text for texts in processes.gather(own) for text in texts))
        or "no single term"
    )
