"""Signals that end a run. This file imports no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The run was told to stop by a signal and has saved; the same command goes on."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; the same command goes on"
        )
        self.signum = signum


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM end nothing: the list gets the signal. A second SIGINT is a
    KeyboardInterrupt."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(signum: int, frame: FrameType | None) -> None:
        # The second Ctrl-C means now. A second SIGTERM does not: a scheduler and torchrun may send one each.
        if signum == signal.SIGINT in caught:
            raise KeyboardInterrupt
        caught.append(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
