"""The checks, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from tests.gpu import speed, training
from tests.gpu.outcome import Outcome
from tests.gpu.precision import NETWORKS, compare_precisions
from tests.gpu.tasks import FULL, TINY, all_presets


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table."""

    name: str
    run: Callable[[torch.device], Outcome]
    limit: float = 120.0
    """Seconds after which it is stopped, so that others have time."""
    deterministic: bool = False
    """On a GPU it runs in a process whose libraries use deterministic algorithms."""


def all_checks(device: torch.device) -> list[Check]:
    """All checks: at published sizes for a GPU, at tiny sizes for a CPU."""
    names = all_presets() if device.type == "cuda" else list(TINY)
    return [
        *(
            Check(name=f"resume: {stage}", run=partial(training.resume, stage), deterministic=True)
            for stage in training.STAGES
        ),
        *(
            Check(name=f"bf16 against float32: {name}", run=partial(compare_precisions, name))
            for name in NETWORKS
        ),
        *(
            Check(name=f"no step waits: {stage}", run=partial(training.waits, stage))
            for stage in training.STAGES
        ),
        Check(name="generator speed", run=partial(speed.generator_speed, compiled=False)),
        Check(name="tokenizer speed, all losses", run=speed.tokenizer_speed),
        Check(name="sampling speed, fast-45", run=speed.sampling),
        *(Check(name=f"memory against plan: {name}", run=partial(training.memory, name)) for name in FULL),
        Check(
            name="generator speed, compiled", run=partial(speed.generator_speed, compiled=True), limit=200.0
        ),
        *(Check(name=f"step: {name}", run=partial(training.step, name)) for name in names),
    ]
