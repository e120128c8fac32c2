"""Batches that other processes read. One that dies, or finds no shared memory, ends the run in one line."""

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
"""Where Linux keeps the memory through which batches come from other processes."""


def read_batches(
    dataset: Dataset[Any],
    sampler: StepBatches,
    num_workers: int,
    *,
    pin: bool,
    what: str,
    place: Callable[[set[int | None]], str] | None = None,
) -> Iterator[Any]:
    """Batches in the sampler's order, read in this process or in `num_workers` others.

    Args:
        dataset: makes whole batches (`__getitems__`).
        sampler: which, and in which order.
        num_workers: processes that read; 0 reads in this one.
        pin: copy batches to pinned memory.
        what: what is read, for messages.
        place: what the processes with these ids were reading, for messages.

    Raises:
        ChildProcessError: a process that reads died; the message names what it was reading.
        OSError: there is no shared memory left for a batch.
    """
    readers = Children()
    try:
        yield from _started(dataset, sampler, num_workers, pin, readers)
    except Exception as error:
        raise _explained(error, readers, what, place) from error


def share(tensors: Iterable[Tensor]) -> None:
    """Move tensors to memory that other processes see.

    Raises:
        OSError: there is no room for them.
    """
    left = [tensor for tensor in tensors if tensor.numel()]
    try:
        for tensor in left:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError:
        wanted = sum(tensor.numel() * tensor.itemsize for tensor in left)
        raise OSError(_no_room(f" for {wanted:,} bytes")) from None


def _started(
    dataset: Dataset[Any], sampler: StepBatches, num_workers: int, pin: bool, readers: Children
) -> Iterator[Any]:
    if num_workers:
        readers.Event()  # where there is no room for it, PyTorch would leave half an iterator behind
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
        # PyTorch's handler would raise wherever the loop is when a process dies, in the middle of saving too.
        # Without it the next batch raises, within five seconds.
        signal.signal(signal.SIGCHLD, before)
    return batches


def _as_is(batch: Any) -> Any:
    return batch


def _shared(batch: Any) -> Any:
    # PyTorch's queue would do it in a thread whose errors nobody receives, and the loop would wait for ever.
    share([value for value in batch if isinstance(value, Tensor)])
    return batch


def _no_room(wanted: str = "") -> str:
    free = f" ({shutil.disk_usage(SHARED_MEMORY).free:,} are free)" if SHARED_MEMORY.is_dir() else ""
    return (
        f"{SHARED_MEMORY} has no room{wanted}{free}; give it more (docker run --shm-size=8g), or lower "
        "loop.num_workers (0 needs none) or loop.device_batch_size"
    )


def _explained(
    error: Exception, readers: Children, what: str, place: Callable[[set[int | None]], str] | None
) -> Exception:
    """The error in one line that says what to do; an error that says it already is left alone."""
    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # no room for the queues themselves
        return OSError(_no_room())
    if text.startswith("Caught "):  # raised by a process that reads, with its traceback
        said = re.findall(rf"^[\w.]*{type(error).__name__}: (.*)$", text, re.MULTILINE)
        return type(error)(said[-1]) if said else error
    ended = wait([reader.sentinel for reader in readers.started], timeout=5.0) if readers.started else []
    for reader in readers.started:
        if reader.sentinel in ended:  # its pipes close a moment before the system knows how it ended
            reader.join(5.0)
    if not (dead := readers.dead()):
        return error
    causes = " and ".join(sorted({cause_of_death(reader) for reader in dead}))
    if "SIGBUS" in causes:  # what some systems answer to shared memory that is used up
        return OSError(_no_room())
    if place is not None:
        what += f" died at {place({reader.pid for reader in dead})}; remove the file if it dies there again,"
    else:
        what += " died;"
    return ChildProcessError(
        f"a process that reads {what} lower loop.num_workers if memory ran out, or set it to 0 to see what "
        f"happens ({causes})"
    )
