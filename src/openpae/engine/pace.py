"""Training with a time limit: the position in the schedule of each optimizer step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_WINDOW = 0.02
"""Share of the allowed time between two plans."""

_MOST = 1_000_000
"""The most optimizer steps of a run with a time limit."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A linear map from optimizer steps to positions of the schedule, from one step on."""

    step: int = 0
    """Optimizer steps done when the plan was made."""
    position: float = 0.0
    """Position of the schedule at that step."""
    last: int
    """Optimizer steps at the end of the run."""
    seconds: float = 0.0
    """Seconds of training when the plan was made."""


class Pace:
    """The map from optimizer steps to the `total` positions of the schedule.

    Without a time limit the position is the step. With one, the run measures its seconds per step repeatedly
    and spreads the rest of the schedule over the steps that the remaining time allows.

    Args:
        total: positions of the schedule.
        allowed: time limit in seconds; None for no limit.
        least: minimum of optimizer steps; it overrides the time limit.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        total: int,
        allowed: float | None,
        least: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.allowed, self.least, self.clock = total, allowed, least, clock
        self.most = total if allowed is None else max(total, _MOST)
        self.plan = Plan(last=total)
        self._before, self._start = 0.0, clock()

    def position(self, step: int) -> float:
        """Position after `step` optimizer steps, in [0, total]; exactly `step` without a time limit."""
        plan = self.plan
        if step >= plan.last:
            return float(self.total)
        return plan.position + (self.total - plan.position) * (step - plan.step) / (plan.last - plan.step)

    def crosses(self, every: int, done: int) -> bool:
        """Whether the position reached a multiple of `every` in the last of `done` steps; never for 0."""
        return every > 0 and self.position(done) // every > self.position(done - 1) // every

    def seconds(self) -> float:
        """Seconds of training so far, over all starts of the run."""
        return self._before + self.clock() - self._start

    def revise(self, step: int, seconds: float) -> bool:
        """Make a new plan if one is due. Returns whether it did.

        The position is continuous at `step`; the slope changes.

        Args:
            step: optimizer steps done.
            seconds: seconds of training so far; equal on all ranks.
        """
        old, allowed = self.plan, self.allowed
        if allowed is None or not old.step < step < old.last or seconds - old.seconds < _WINDOW * allowed:
            return False
        position = self.position(step)
        each = (seconds - old.seconds) / (step - old.step)
        affordable = int(max(0.0, allowed - seconds) / each)
        fewest = math.ceil((1 - position / self.total) * self.least)
        left = max(1, min(max(affordable, fewest), self.most - step))
        self.plan = Plan(step=step, position=position, last=step + left, seconds=seconds)
        return True

    def log(self) -> dict[str, float]:
        """The plan, for the log of the run."""
        plan = self.plan
        return {
            "pace/seconds": plan.seconds,
            "pace/share": plan.position / self.total,
            "pace/last_step": plan.last,
        }

    def facts(self) -> dict[str, Any] | None:
        """The plan and the seconds so far, for a checkpoint; None without a time limit."""
        if self.allowed is None:
            return None
        return {"plan": dataclasses.asdict(self.plan), "seconds": self.seconds()}

    def restore(self, facts: Mapping[str, Any] | None) -> None:
        """Continue from `facts`."""
        if facts is not None:
            self.plan = Plan(**facts["plan"])
            self._before, self._start = float(facts["seconds"]), self.clock()
