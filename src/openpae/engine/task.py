"""The interface of a training stage to the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from openpae.runtime.draws import Draws

PICTURED = 8
"""Images in the picture of an evaluation."""


@dataclass(frozen=True)
class Update:
    """A loss of one player for one device batch."""

    player: str
    """A key of the task's `players`."""
    loss: Tensor
    """Scalar, with gradient."""
    logs: Mapping[str, Tensor]
    """Terms of the loss by symbol, scalars without gradient; the log has their means."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of the device batch; the log has the sums over all ranks."""


class Task(Protocol):
    """The parts of training that differ between refiner, tokenizer and generator."""

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """The trained modules by name, as `distribute` returned them. The first is exported and averaged."""
        ...

    @property
    def model(self) -> nn.Module:
        """The unsharded module of the first player. If the player is sharded, it holds weights only inside
        `evaluate`."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizers, by the player whose updates they step. One may also step other players' weights."""
        ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of the training data by name. A run resumes only if they agree with those of the
        checkpoint (`storage.files.fingerprints_agree`)."""
        ...

    def batches(self, steps: Sequence[int]) -> Iterable[Any]:
        """This rank's device batches of these steps, in order: NamedTuples of tensors."""
        ...

    def updates(self, batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        """Yield the losses of one batch in order. After a yield the loop runs backward. In the last device
        batch of a step it then steps the player's weights.

        Args:
            batch: one of `batches`.
            draws: random numbers of the batch.
            step: position in the schedule, in [0, loop.steps); the step in a run without a time limit.
        """
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the first player; called without gradients and with the exported weights."""
        ...

    def picture(self) -> Image.Image | None:
        """Pictures of the first player, as one grid; called like `evaluate`, on rank 0 alone. None: it has
        none."""
        ...

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the first player with these weights as a model, into an existing empty folder."""
        ...
