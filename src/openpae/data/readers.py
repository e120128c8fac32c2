"""Batches from worker processes. A dead worker or a lack of shared memory is a one-line error."""

from __future__ import annotations

import errno
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openpae.data.order import StepBatches
from openpae.runtime.children import Children, cause_of_death

SHARED_MEMORY = Path("/dev/shm")
"""Shared memory of Linux, through which workers pass batches."""


def read_batches(
    dataset: Dataset[Any],
    sampler: StepBatches,
    num_workers: int,
    *,
    pin: bool,
    label: str,
    place: Callable[[set[int | None]], str] | None = None,
) -> Iterator[Any]:
    """Batches in the sampler's order, read in this process or by `num_workers` others.

    Args:
        dataset: gives complete batches (`__getitems__`).
        sampler: positions of each batch.
        num_workers: worker processes; 0 reads in this process.
        pin: copy batches to pinned memory.
        label: the data in messages ("images").
        place: process ids of dead workers -> the items they were reading, for messages.

    Raises:
        ChildProcessError: a worker died; the message names the item it was reading.
        OSError: no shared memory is left for a batch.
    """
    readers = Children()
    try:
        yield from _started(dataset, sampler, num_workers, pin, readers)
    except Exception as error:
        raise _explained(error, readers, label, place) from error


def share(tensors: Iterable[Tensor]) -> None:
    """Move tensors to shared memory. Raises OSError if none is left."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError:
        wanted = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        raise OSError(_no_room(f" for {wanted:,} bytes")) from None


def _started(
    dataset: Dataset[Any], sampler: StepBatches, num_workers: int, pin: bool, readers: Children
) -> Iterator[Any]:
    if num_workers:
        readers.Event()  # fails early without shared memory, before PyTorch builds half an iterator
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_shared if num_workers else _as_is,
            pin_memory=pin,
            persistent_workers=num_workers > 0,
            multiprocessing_context=readers if num_workers else None,
        )
    )
    if num_workers and threading.current_thread() is threading.main_thread():
        # PyTorch's handler would raise anywhere in the loop, even while it saves. Without the handler the
        # next batch raises, within five seconds.
        signal.signal(signal.SIGCHLD, before)
    return batches


def _as_is(batch: Any) -> Any:
    return batch


def _shared(batch: Any) -> Any:
    # PyTorch's queue would do this in a thread that hides errors, and the loop would wait forever.
    share([value for value in batch if isinstance(value, Tensor)])
    return batch


def _no_room(wanted: str = "") -> str:
    free = f" ({shutil.disk_usage(SHARED_MEMORY).free:,} are free)" if SHARED_MEMORY.is_dir() else ""
    return (
        f"{SHARED_MEMORY} has no room{wanted}{free}; give it more (docker run --shm-size=8g), or lower "
        "loop.num_workers (0 needs none) or loop.device_batch_size"
    )


def _explained(
    error: Exception, readers: Children, label: str, place: Callable[[set[int | None]], str] | None
) -> Exception:
    """The error as one line that says what to do. Other errors are returned unchanged."""
    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # no room for the queues themselves
        return OSError(_no_room())
    if text.startswith("Caught "):  # raised in a worker, with its traceback
        messages = re.findall(rf"^[\w.]*{type(error).__name__}: (.*)$", text, re.MULTILINE)
        return type(error)(messages[-1]) if messages else error
    ended = wait([reader.sentinel for reader in readers.started], timeout=5.0) if readers.started else []
    for reader in readers.started:
        if reader.sentinel in ended:  # its pipes close just before its exit code is known
            reader.join(5.0)
    if not (dead := readers.dead()):
        return error
    causes = " and ".join(sorted({cause_of_death(reader) for reader in dead}))
    if "SIGBUS" in causes:  # shared memory is used up
        return OSError(_no_room())
    if place is not None:
        label += f" died at {place({reader.pid for reader in dead})}; remove the file if it dies there again,"
    else:
        label += " died;"
    return ChildProcessError(
        f"a process that reads {label} lower loop.num_workers if memory ran out, or set it to 0 to see what "
        f"happens ({causes})"
    )
