"""What a stage gives to the loop: its players, its batches, and the updates that it asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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
        """Yield the losses of one batch in order; what follows a yield sees the stepped weights."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the first player as it stands; called without gradients, under the exported weights."""
        ...

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the first player, with these weights, as a model folder into an existing empty folder."""
        ...


class Draws:
    """The random numbers of one device batch: a pure function of (seed, step, name, rows).

    They are drawn for the global batch and cut, so neither the device batch size nor the number of
    devices changes what a sample gets, and an interrupted run needs no generator state to go on.

    Args:
        seed: of the run.
        step: the optimizer step.
        rows: rows of the global batch that this device batch holds.
        whole: size of the global batch.
        device: where the numbers are drawn.
    """

    def __init__(self, seed: int, step: int, rows: range, whole: int, device: torch.device) -> None:
        self.seed, self.step, self.rows, self.whole, self.device = seed, step, rows, whole, device

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal, (B, *shape)."""
        return self._cut(torch.randn(self.whole, *shape, generator=self._generator(name), device=self.device))

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape)."""
        return self._cut(torch.rand(self.whole, *shape, generator=self._generator(name), device=self.device))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=7).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest, "big"))

    def _cut(self, numbers: Tensor) -> Tensor:
        return numbers[self.rows.start : self.rows.stop : self.rows.step]
