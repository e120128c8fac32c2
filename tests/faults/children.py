"""Processes that run into trouble on purpose: limited in what they may write, or killed at any moment."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """How a child process ended."""

    killed: bool
    error: str
    """Type and message of what it raised; empty if nothing."""
    trace: str
    """Its traceback."""


def run_in_child(
    action: Callable[[], object], *, largest_file: int | None = None, kill_after: float | None = None
) -> Ended:
    """Run an action in a forked process.

    Args:
        action: what it does.
        largest_file: largest size of a file in bytes (EFBIG, as with a quota), whoever writes it:
            Python, NumPy, torch's C++ or safetensors' Rust.
        kill_after: send SIGKILL after this many seconds, if it still runs.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads
        child = os.fork()
    if not child:
        os.close(reading)
        _run(action, largest_file, writing)
    os.close(writing)
    status = _wait(child, kill_after)
    with os.fdopen(reading, "rb") as pipe:
        error, _, trace = pipe.read().decode().partition("\n---\n")
    killed = os.WIFSIGNALED(status)
    assert not killed or os.WTERMSIG(status) == signal.SIGKILL, f"died of signal {os.WTERMSIG(status)}"
    return Ended(killed, error, trace)


def _wait(child: int, kill_after: float | None) -> int:
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _run(action: Callable[[], object], largest_file: int | None, writing: int) -> None:
    message = ""
    try:
        if largest_file is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
        action()
    except BaseException as error:
        message = f"{type(error).__name__}: {error}\n---\n{traceback.format_exc()}"
    os.write(writing, message[:10_000].encode(errors="replace"))  # what a pipe holds unread
    os._exit(bool(message))
