"""The processes that work on one task: none but this one, or those that torchrun has started.

A command joins the others once, with `process_group`; the library asks `rank` and `world_size`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def rank() -> int:
    """Number of this process, 0 for the first or the only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_rank0() -> bool:
    """Whether this is the process that writes and tells."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def broadcast(value: T) -> T:
    """What the first process holds, in every process; the others' value is ignored."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """What every process holds, in the order of their ranks, in every process."""
    if not distributed.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # every process has filled its place


def on_rank0(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in every process; where it raises, every process raises that.

    For what one process does on behalf of all, such as writing a file: none waits for one that has failed,
    and none goes on before it is done.
    """
    if not distributed.is_initialized():
        return make()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_rank0():
        try:
            outcome = (make(), None)
        except Exception as error:
            outcome = (None, error)
    value, failure = broadcast(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]  # None only where `make` gives None


@contextmanager
def failing_together() -> Iterator[None]:
    """An error in the block of any process is raised in all, once every process has come to its end.

    For work that each does by itself: none then waits for one that has failed.
    """
    if not distributed.is_initialized():
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if failures := [error for error in gather(own) if error is not None]:
        raise own or failures[0]


def any_rank(value: bool) -> bool:
    """Whether it holds in any process; all of them wait for the answer."""
    if not distributed.is_initialized():
        return value
    flag = torch.tensor(int(value))
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def mean_of(value: Tensor) -> Tensor:
    """The mean of one tensor over all processes, in every process; nothing waits on a GPU."""
    if not distributed.is_initialized():
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / world_size()


def largest_of(value: Tensor) -> Tensor:
    """The largest value of each element over all processes, in every process; nothing waits on a GPU."""
    if not distributed.is_initialized():
        return value
    largest = value.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


def norm_of(norm: Tensor) -> Tensor:
    """The norm of all processes' parts together, from that of each: the root of the sum of squares."""
    if not distributed.is_initialized():
        return norm
    total = norm.square()
    distributed.all_reduce(total)
    return total.sqrt()


class Ballot:
    """A number that all processes agree on step by step without waiting for each other.

    Every process calls it once a step with a number of its own; what it gets is the largest that any process
    has put in, one call ago where there are several processes, and in this call where there is one.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, distributed.Work] | None = None

    def __call__(self, own: int) -> int:
        if not distributed.is_initialized():
            return own
        agreed = self.close()
        number = torch.tensor(own)
        work = distributed.all_reduce(number, distributed.ReduceOp.MAX, async_op=True)
        assert work is not None  # only a process outside of the group gets none
        self._pending = (number, work)
        return agreed

    def close(self) -> int:
        """Wait for the vote that is under way, if there is one; returns what was agreed, or 0."""
        if self._pending is None:
            return 0
        number, work = self._pending
        self._pending = None
        work.wait()
        return int(number)


def own_cores() -> int:
    """How many of this machine's cores are this process's share, where torchrun has started several on it."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def rank_slice(count: int) -> range:
    """Which of `count` rows are this process's: every world-th, so that all finish together."""
    return range(rank(), count, world_size())


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the processes that torchrun has started, for as long as the block runs; alone it does nothing.

    Each process of a machine takes the GPU of its local rank. Collectives go over NCCL and, for
    what lies on the CPU, over gloo.

    Args:
        device: as in `LoopConfig.device`: cpu keeps off GPUs that are there.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    try:
        yield
    finally:
        distributed.destroy_process_group()
