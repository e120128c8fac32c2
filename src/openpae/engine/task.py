"""What a stage gives to the loop: its players, its batches, and the updates that it asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from openpae.runtime.draws import Draws


@dataclass(frozen=True)
class Update:
    """One optimizer step that a task asks for."""

    player: str
    """Whose weights the step changes: a key of the task's `players`."""
    loss: Tensor
    """Scalar, with gradient."""
    logs: Mapping[str, Tensor]
    """The loss's terms by symbol, scalars without gradient; the log has their means."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What is counted in the device batch; the log has the sums over all processes."""


class Task(Protocol):
    """What differs between training a refiner, a tokenizer and a generator. The rest is the loop's."""

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """What the losses call, by name: modules that are trained, each as `distribute` gives it. The first
        is the one that is exported and averaged."""
        ...

    @property
    def model(self) -> nn.Module:
        """The module of the first player, whole, as it is judged; where the player is cut into shards, it
        holds no weights outside of `evaluate`."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizer of each player."""
        ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of what it trains on, by name: a run goes on only where they are the same."""
        ...

    def batches(self, steps: Sequence[int]) -> Iterable[Any]:
        """This process's device batches of these steps, in order; NamedTuples of tensors."""
        ...

    def updates(self, batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        """Yield the losses of one batch in order; what follows a yield sees the stepped weights.

        Args:
            batch: one of `batches`.
            draws: random numbers of the batch.
            step: position in the schedule of loop.steps: the step, unless the run follows the clock.
        """
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the first player as it stands; called without gradients, under the exported weights."""
        ...

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the first player, with these weights, as a model folder into an existing empty folder."""
        ...
