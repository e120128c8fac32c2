"""Child processes that ignore stop signals and end with their parent.

SIGTERM and SIGINT often reach every process of a group (torchrun, SLURM, Docker, a terminal). Only the parent
handles them, and its children must live until it has saved.
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
"""Signals that stop a process group."""


class Child(SpawnProcess):
    """A spawned process that blocks SIGINT and SIGTERM and ends with its parent."""

    def start(self) -> None:
        """Start the process with the stop signals blocked."""
        resource_tracker.ensure_running()  # its start would unblock the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # SIGTERM is blocked: `terminate`, also called when this process ends, must send SIGKILL.
        self._popen.terminate = self._popen.kill  # type: ignore[attr-defined]

    def run(self) -> None:
        """Run the target while a thread waits for the end of the parent."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class Children(SpawnContext):
    """A multiprocessing context whose processes are `Child`s, listed in `started`."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Child] = []

    def Process(self, *args: Any, **options: Any) -> Child:  # type: ignore[override]
        """Create a process and list it in `started`."""
        self.started.append(Child(*args, **options))
        return self.started[-1]

    def dead(self) -> list[Child]:
        """The processes that ended with a signal or an error."""
        return [child for child in self.started if not child.is_alive() and child.exitcode]


def cause_of_death(child: Child) -> str:
    """The signal or exit code that a process ended with."""
    code = child.exitcode or 0
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only a `Child` runs this
    parent.join()  # waits on a pipe that closes with the parent, even if it is killed
    os._exit(1)
