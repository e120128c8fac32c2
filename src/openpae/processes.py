"""The processes that work on one task: none but this one, or those that torchrun has started.

A command joins the others once, with `joined`; the library asks `rank` and `world`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def rank() -> int:
    """Number of this process, 0 for the first or the only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and tells."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def share(value: T) -> T:
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
    values: list[T | None] = [None] * world()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # every process has filled its place


def own_rows(count: int) -> range:
    """Which of `count` rows are this process's: every world-th, so that all finish together."""
    return range(rank(), count, world())


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
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
