"""Ranks and collectives: the processes that torchrun started, or this process alone.

A command joins the group once, with `process_group`. Without a group every function works for one rank.
Of the other rooms only `engine` and `plan` may import torch.distributed; tests/test_structure.py holds that.
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
    """Rank of this process; 0 without a group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_rank0() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if distributed.is_initialized():
        distributed.barrier()


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all ranks in order, on every rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # every rank has filled its place


def on_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0. Every rank returns its result, or raises its error.

    All ranks wait until the call is done.
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
    return value  # type: ignore[return-value]  # None only if `make` returns None


@contextmanager
def failing_together() -> Iterator[None]:
    """Wait for all ranks at the end of the block. An error on any rank is raised on all."""
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
    """Whether the value is true on any rank; all ranks wait for the result."""
    if not distributed.is_initialized():
        return value
    flag = torch.tensor(int(value))
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def mean_of(value: Tensor) -> Tensor:
    """Mean of a tensor over ranks, on every rank; the host does not wait for a GPU."""
    if not distributed.is_initialized():
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / world_size()


def largest_of(value: Tensor) -> Tensor:
    """Elementwise maximum over ranks, on every rank; the host does not wait for a GPU."""
    if not distributed.is_initialized():
        return value
    largest = value.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


def norm_of(norm: Tensor) -> Tensor:
    """Norm of a vector that is split over ranks, from the norms of its parts."""
    if not distributed.is_initialized():
        return norm
    total = norm.square()
    distributed.all_reduce(total)
    return total.sqrt()


class Ballot:
    """Maximum of a number over ranks at every step, without waiting.

    Every rank calls it once per step. The result is the maximum of the previous call, or the own number of
    this call without a group.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, distributed.Work] | None = None

    def __call__(self, own: int) -> int:
        if not distributed.is_initialized():
            return own
        agreed = self.close()
        number = torch.tensor(own)
        work = distributed.all_reduce(number, distributed.ReduceOp.MAX, async_op=True)
        assert work is not None  # None only outside of the group
        self._pending = (number, work)
        return agreed

    def close(self) -> int:
        """Wait for the pending reduction, if any, and return its result, or 0."""
        if self._pending is None:
            return 0
        number, work = self._pending
        self._pending = None
        work.wait()
        return int(number)


def own_cores() -> int:
    """Number of cores per rank on this machine, at least 1."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def rank_slice(count: int) -> range:
    """Rows of this rank: every `world_size`-th of `count` rows."""
    return range(rank(), count, world_size())


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the group that torchrun started, for the duration of the block. Without torchrun it does nothing.

    Each process takes the GPU of its local rank. Collectives use NCCL on GPUs and gloo on the CPU.

    Args:
        device: see `LoopConfig.device`; "cpu" uses no GPU.
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
