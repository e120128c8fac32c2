"""Other processes read: what goes wrong there is one line here, and the loop never waits for ever."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from openpae.data.order import StepBatches
from openpae.data.readers import read_batches, share
from openpae.runtime.children import Children


class Batch(NamedTuple):
    values: Tensor
    process: int


class Spoiled(Dataset[Batch]):
    """Batches of four; in the third something happens."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens

    def __getitems__(self, positions: list[int]) -> Batch:
        if positions[0] == 8:
            self.happens()
        return Batch(torch.tensor(positions), os.getpid())


def fill_shared_memory() -> None:
    def refuse(self: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)")

    torch.Tensor.share_memory_ = refuse  # type: ignore[method-assign, assignment]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fault_of_the_bus() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def run_out_of_memory() -> None:
    raise MemoryError("no memory for an image\nof 3 lines")


def read(happens: Callable[[], None], workers: int = 1, **options: Any) -> list[Batch]:
    sampler = StepBatches(range(6), 4, [range(4)])
    return list(read_batches(Spoiled(happens), sampler, workers, pin=False, label="latents", **options))


@pytest.mark.parametrize(
    ("happens", "kind", "message"),
    [
        (
            kill,
            ChildProcessError,
            r"^a process that reads latents died; .*num_workers.* \(killed by SIGKILL\)$",
        ),
        (fault_of_the_bus, OSError, r"^/dev/shm has no room.*--shm-size.*loop.num_workers"),
        (fill_shared_memory, OSError, r"^/dev/shm has no room for 32 bytes.*--shm-size.*loop.num_workers"),
        (run_out_of_memory, MemoryError, r"^no memory for an image$"),
    ],
)
def test_what_ends_a_reader_is_one_line(
    happens: Callable[[], None], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        read(happens)
    assert len(str(caught.value).splitlines()) == 1


def test_what_the_dead_was_reading_is_asked_for_by_its_id() -> None:
    with pytest.raises(
        ChildProcessError, match=r"latents died at number \d+; remove the file if it dies there"
    ):
        read(kill, 2, place=lambda dead: f"number {', '.join(map(str, dead))}")


def test_an_error_of_this_process_is_left_alone() -> None:
    with pytest.raises(MemoryError, match="no memory for an image\nof 3 lines"):
        read(run_out_of_memory, workers=0)


def test_no_room_for_the_queues_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Children, "Event", refuse)
    with pytest.raises(OSError, match=r"^/dev/shm has no room.*--shm-size"):
        read(kill)


def test_nothing_needs_no_room() -> None:
    fill = torch.Tensor.share_memory_
    try:
        fill_shared_memory()
        share([torch.empty(0)])
        with pytest.raises(OSError, match=r"/dev/shm has no room for 24 bytes"):
            share([torch.zeros(2), torch.zeros(4)])
    finally:
        torch.Tensor.share_memory_ = fill  # type: ignore[method-assign]
