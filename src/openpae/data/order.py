"""Order and random bits of training data: pure functions of (seed, images seen)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class StepBatches(Sampler[list[int]]):
    """Positions of each device batch, in the order of the steps.

    Step s sees the positions s G, ..., (s + 1) G - 1, where G is the global batch size.

    Args:
        steps: step numbers.
        global_batch_size: G.
        rows: rows of the global batch in each device batch of a step, of all ranks or of one.
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
    """Rows at these positions. Each epoch is another permutation of `count` rows."""
    epochs, offsets = np.divmod(positions, count)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _permutation(seed, int(epoch), count)[offsets[chosen]]
    return rows


def random_bits(positions: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """64 random bits per position, from two rounds of splitmix64 over (seed, position)."""
    golden = 0x9E3779B97F4A7C15
    x = positions.astype(np.uint64) + np.uint64(seed * golden % 2**64)  # Python int, as NumPy would overflow
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
        # A batch may span two epochs, and training and evaluation alternate: keep four.
        while len(_LAST_PERMUTATIONS) > 3:
            del _LAST_PERMUTATIONS[next(iter(_LAST_PERMUTATIONS))]
        _LAST_PERMUTATIONS[key] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    return _LAST_PERMUTATIONS[key]
