"""Processes that this one starts: they leave stop signals to it, and end when it ends.

SIGTERM and SIGINT often reach a whole process group (torchrun, SLURM, Docker, a terminal). Only the parent
decides what a signal means, and its children must live until it has saved.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
"""What a process group is stopped with."""


class Child(SpawnProcess):
    """A spawned process that blocks SIGINT and SIGTERM from its start on, and ends with its parent."""

    def start(self) -> None:
        """Start it; it inherits the signals that are blocked meanwhile."""
        resource_tracker.ensure_running()  # its own start would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Both `terminate` and the end of this process, which waits for its children, would send a SIGTERM.
        self._popen.terminate = self._popen.kill  # type: ignore[attr-defined]

    def run(self) -> None:
        """Run the target; a thread beside it waits for the end of the parent."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class Children(SpawnContext):
    """A multiprocessing context that starts each process as a `Child`, and keeps them in `started`."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Child] = []

    def Process(self, *args: Any, **options: Any) -> Child:  # type: ignore[override]
        """Make a process; `started` lists it."""
        self.started.append(Child(*args, **options))
        return self.started[-1]

    def dead(self) -> list[Child]:
        """The processes that a signal or an error ended."""
        return [child for child in self.started if not child.is_alive() and child.exitcode]


def cause_of_death(child: Child) -> str:
    """How a process ended, in words."""
    code = child.exitcode or 0
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only a `Child` runs this
    parent.join()  # waits on a pipe that closes when the parent ends, however it ends
    os._exit(1)
