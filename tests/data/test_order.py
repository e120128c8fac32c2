"""The order of data: every epoch sees everything once, and any step can be asked for alone."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from openpae.data.order import StepBatches, random_bits, shuffled
from openpae.data.readers import read_batches
from openpae.runtime.children import STOP_SIGNALS

seeds = st.integers(0, 2**63)


@given(count=st.integers(1, 40), seed=seeds, epochs=st.integers(1, 4))
def test_every_epoch_is_a_permutation(count: int, seed: int, epochs: int) -> None:
    rows = shuffled(np.arange(epochs * count), count, seed).reshape(epochs, count)
    assert (np.sort(rows, axis=1) == np.arange(count)).all()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [shuffled(np.arange(e * 50, (e + 1) * 50), 50, seed) for seed in (0, 1) for e in range(3)]
    assert len({tuple(order) for order in orders}) == 6


@given(positions=st.lists(st.integers(0, 500), max_size=30), count=st.integers(1, 40), seed=seeds)
def test_positions_can_be_asked_for_in_any_company(positions: list[int], count: int, seed: int) -> None:
    """A batch over the border of epochs, a repeated or a single position: the row is the same."""
    where = np.array(positions, dtype=np.int64)
    alone = [shuffled(np.array([p]), count, seed)[0] for p in positions]
    assert shuffled(where, count, seed).tolist() == alone
    assert random_bits(where, seed).tolist() == [random_bits(np.array([p]), seed)[0] for p in positions]


@pytest.mark.parametrize("seed", [0, 1, 2, 12345, 2**40, 2**63])
def test_bits_are_fair_and_independent_of_their_neighbours(seed: int) -> None:
    """Each of 64 bits is one in half of the cases, also together with the same bit of the next position."""
    bits = random_bits(np.arange(4096), seed)
    ones = np.unpackbits(bits.view(np.uint8)).reshape(4096, 64).astype(float)
    assert np.abs(ones.mean(0) - 0.5).max() < 0.05  # six standard deviations
    assert np.abs((ones[1:] * ones[:-1]).mean(0) - 0.25).max() < 0.05
    assert len(set(bits.tolist())) == 4096


def test_bits_of_seeds_differ_beyond_32_bits() -> None:
    where = np.arange(100)
    drawn = [tuple(random_bits(where, seed)) for seed in (0, 1, 2**32, 2**32 + 1)]
    assert len(set(drawn)) == 4


@given(first=st.integers(0, 9), steps=st.integers(0, 5), parts=st.integers(1, 4), part=st.integers(1, 4))
def test_batches_of_a_step_do_not_depend_on_where_training_began(
    first: int, steps: int, parts: int, part: int
) -> None:
    whole = parts * part
    rows = [range(start, start + part) for start in range(0, whole, part)]
    batches = StepBatches(range(first, first + steps), whole, rows)
    found = list(batches)
    assert len(found) == len(batches) == steps * parts
    assert all(len(batch) == part for batch in found)
    assert [i for batch in found for i in batch] == list(range(first * whole, (first + steps) * whole))


def test_a_process_sees_its_rows_of_the_steps_that_are_asked_for() -> None:
    batches = StepBatches([3, 5], 6, [range(1, 4, 2), range(5, 6)])
    assert list(batches) == [[19, 21], [23], [31, 33], [35]]
    assert len(batches) == 4


class Squares(Dataset[list[int]]):
    """A batch that says which process made it."""

    def __getitems__(self, positions: list[int]) -> list[int]:
        return [os.getpid(), *(p * p for p in positions)]


def test_worker_processes_keep_the_order_and_ignore_interrupts() -> None:
    """Ctrl-C reaches workers too; the loop finishes its step, so they must go on."""
    sampler = StepBatches(range(2, 8), 2, [range(1), range(1, 2)])
    alone = [batch[1:] for batch in read_batches(Squares(), sampler, 0, pin=False, label="numbers")]
    batches = read_batches(Squares(), sampler, 1, pin=False, label="numbers")
    first = next(batches)
    assert first[0] != os.getpid()
    for stop in STOP_SIGNALS:
        os.kill(first[0], stop)
    assert [first[1:], *(batch[1:] for batch in batches)] == alone == [[p * p] for p in range(4, 16)]
