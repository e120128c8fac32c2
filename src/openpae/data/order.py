"""The order of training data and its chance decisions: pure functions of (seed, images seen)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class StepBatches(Sampler[list[int]]):
    """Positions of the device batches of these steps, in order.

    Step s sees positions s G, ..., (s + 1) G - 1, G the global batch.

    Args:
        steps: step numbers, one after the other.
        global_batch_size: G.
        rows: of each device batch of a step, its rows in the global batch: all of them, or one process's.
    """

    def __init__(self, steps: Sequence[int], global_batch_size: int, rows: Sequence[range]) -> None:
        self.steps, self.global_batch_size, self.rows = steps, global_batch_size, rows

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for rows in self.rows:
                yield [step * self.global_batch_size + row for row in rows]

    def __len__(self) -> int:
        return len(self.steps) * len(self.rows)


def shuffled(positions: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Rows at these positions of an endless series of epochs, each a fresh permutation of `count` rows."""
    epochs, offsets = np.divmod(positions, count)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _permutation(seed, int(epoch), count)[offsets[chosen]]
    return rows


def random_bits(positions: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """64 random bits per position, a pure function of (seed, position): two rounds of splitmix64."""
    golden = 0x9E3779B97F4A7C15
    x = positions.astype(np.uint64) + np.uint64(seed * golden % 2**64)  # Python's int: NumPy's would overflow
    for _ in range(2):
        x = x + np.uint64(golden)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


_LAST_PERMUTATIONS: dict[tuple[int, int, int], NDArray[np.int64]] = {}


def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    key = (seed, epoch, count)
    if key not in _LAST_PERMUTATIONS:
        while (
            len(_LAST_PERMUTATIONS) > 3
        ):  # a batch may span two epochs, and training and evaluation alternate
            del _LAST_PERMUTATIONS[next(iter(_LAST_PERMUTATIONS))]
        _LAST_PERMUTATIONS[key] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    return _LAST_PERMUTATIONS[key]
