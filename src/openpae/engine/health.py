"""What becomes of a step that is not finite, or whose gradient is far longer than its like."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.runtime import processes

WARM_UP = 20
"""Steps of a player before its mean gradient norm is trusted."""
MEMORY = 100
"""Steps that the mean looks back."""


class NotFinite(FloatingPointError):
    """A step is not finite, and nothing was saved after it.

    Args:
        step: its number.
        what: the terms that are not finite.
        where: what computing it again has found out.
    """

    def __init__(self, step: int, what: str, where: str = "") -> None:
        found = f"; {where}" if where else ""
        super().__init__(
            f"training is not finite at step {step}: {what}{found}; "
            "nothing was saved after it: lower optim.lr, set optim.clip, or use loop.precision fp32"
        )
        self.step, self.what = step, what


class NonFiniteGuard:
    """Looks at every loss and gradient norm, and says which updates are left out.

    A CPU is asked at once. On a GPU nothing may wait for an answer: there each update carries a flag that
    lets the optimizer leave it out, and the flags are read with the log. Under stop and rollback they stay up
    once one is: the weights remain those of the bad step until it is read and computed again.

    Processes decide together: what is not finite in one of them is not finite for all.

    Args:
        loop: what to do about values that are not finite.
        optim: what counts as a spike.
        device: where the losses are computed.
    """

    def __init__(self, loop: LoopConfig, optim: OptimConfig, device: torch.device) -> None:
        self.policy, self.limit, self.factor = loop.on_nonfinite, loop.nonfinite_limit, optim.spike_factor
        self.at_once = device.type == "cpu" and self.policy != "skip"
        self.device = device
        self.norms: dict[str, Tensor] = {}
        """Of each player: steps seen, and mean gradient norm."""
        self.forget()

    def forget(self) -> None:
        """Start anew, as a run does that has gone back."""
        self.first_bad = torch.full((), math.inf, device=self.device)
        self.bad: dict[str, Tensor] = {}
        self.in_a_row: dict[str, Tensor] = {}
        self.longest = torch.zeros((), device=self.device)
        self.norms.clear()

    @property
    def may_skip(self) -> bool:
        """Whether steps may be left out while the run goes on; the log then counts them."""
        return self.policy == "skip" or self.factor is not None

    def check_loss(self, step: int, player: str, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """See the loss of a device batch before its backward pass.

        Raises:
            NotFinite: it is not finite, here or in another process; on a GPU `require_finite` tells it.
        """
        if self.at_once:
            self._stop_unless(loss, step, terms)
        else:
            bad = ~loss.detach().isfinite()
            self.bad[player] = self.bad[player] | bad if player in self.bad else bad

    def check_gradient(self, step: int, player: str, norm: Tensor) -> Tensor | None:
        """See the gradient norm of an update before its step; it is that of all processes.

        Returns:
            Scalar, 1 if the update must be left out and 0 if not; None where all are taken.

        Raises:
            NotFinite: as in `check_loss`.
        """
        out: Tensor | None = None
        if self.at_once:  # a finite loss can have a gradient that is not
            self._stop_unless(norm, step, {f"{player}/grad_norm": norm})
        else:
            out = self._left_out(step, player, norm)
        if self.factor is not None:
            spike = self._is_spike(player, norm, self.factor)
            out = spike if out is None else torch.maximum(out, spike)
        return out

    def require_finite(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Read the flags of the steps up to this one; on a GPU this waits for them.

        Raises:
            NotFinite: one was not finite; or, where such steps are skipped, too many in a row.
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

    def _left_out(self, step: int, player: str, norm: Tensor) -> Tensor:
        # The gradient is shared, so its norm is bad everywhere or nowhere; a loss may be bad in one process.
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
        # A spike counts as the longest norm that is none: where the level itself rises, the mean follows.
        seen = torch.where(known, torch.minimum(norm, factor * mean), norm)
        moved = mean + (seen - mean) / (count + 1).clamp(max=MEMORY)
        spike = (known & (norm > factor * mean)).float()
        self.norms[player] = torch.where(finite, torch.stack([count + 1, moved]), self.norms[player])
        return spike


def _named(terms: Mapping[str, Tensor]) -> str:
    """The terms that are not finite in any process, with their values."""
    here = [f"{name} = {value.item()}" for name, value in terms.items() if not value.isfinite()]
    found = dict.fromkeys(text for texts in processes.gather(here) for text in texts)
    return ", ".join(found) or "no single term"
