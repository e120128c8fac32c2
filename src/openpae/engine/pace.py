"""Training that follows the clock: which position of the schedule each optimizer step has."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_WINDOW = 0.02
"""Share of the time after which the pace is measured again."""

_MOST = 1_000_000
"""The most optimizer steps of a run with a time limit."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The line from optimizer steps to positions of the schedule, from one step on."""

    step: int = 0
    """Optimizer steps done when the plan was made."""
    position: float = 0.0
    """Position of the schedule at that step."""
    last: int
    """Optimizer steps at the end of the run."""
    seconds: float = 0.0
    """Seconds of training when the plan was made."""


class Pace:
    """How a run passes through its schedule of `total` positions.

    An ordinary run has one position a step: position and step are the same number, whatever the clock says. A
    run with a time limit measures its seconds per step again and again, and spreads what is left of the
    schedule over the steps that the time left pays for.

    Args:
        total: positions of the schedule; also the optimizer steps of an ordinary run.
        allowed: seconds that the run may take; None makes an ordinary run.
        least: the fewest optimizer steps of a run: where the time does not pay for them, it takes longer.
        clock: the time in seconds.
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
        """Position after `step` optimizer steps, in [0, total]; exactly `step` in an ordinary run."""
        plan = self.plan
        if step >= plan.last:
            return float(self.total)
        return plan.position + (self.total - plan.position) * (step - plan.step) / (plan.last - plan.step)

    def crosses(self, every: int, done: int) -> bool:
        """Whether the last of `done` steps reached or passed a multiple of `every`; never for 0."""
        return every > 0 and self.position(done) // every > self.position(done - 1) // every

    def seconds(self) -> float:
        """Seconds of training so far, over all starts of the run."""
        return self._before + self.clock() - self._start

    def revise(self, step: int, seconds: float) -> bool:
        """Make a new plan if it is time for one; says whether it did.

        The position does not jump: from `step` on, the schedule goes on with another slope.

        Args:
            step: optimizer steps done.
            seconds: seconds of training so far; equal in all processes.
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
        """What the run's log says of a plan."""
        plan = self.plan
        return {
            "pace/seconds": plan.seconds,
            "pace/share": plan.position / self.total,
            "pace/last_step": plan.last,
        }

    def facts(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: the plan in force and the seconds so far; None in an ordinary run."""
        if self.allowed is None:
            return None
        return {"plan": dataclasses.asdict(self.plan), "seconds": self.seconds()}

    def restore(self, facts: Mapping[str, Any] | None) -> None:
        """Go on with what `facts` gave, from now on."""
        if facts is not None:
            self.plan = Plan(**facts["plan"])
            self._before, self._start = float(facts["seconds"]), self.clock()
