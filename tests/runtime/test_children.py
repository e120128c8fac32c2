"""Processes that this one starts leave stop signals to it, and end when it ends, however it ends."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from openpae.runtime.children import STOP_SIGNALS, Children, cause_of_death


def hold(place: str) -> None:
    """Hold a lock until this process ends; a file says that it is held."""
    with FileLock(f"{place}.lock"):
        Path(place).write_text("held")
        time.sleep(600)


def leave(code: int) -> None:
    os._exit(code)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def test_a_child_outlives_the_signals_that_stop_a_group_and_says_how_it_died(tmp_path: Path) -> None:
    children = Children()
    holding, leaving = (
        children.Process(target=hold, args=(str(tmp_path / "a"),), daemon=True),
        children.Process(target=leave, args=(3,), daemon=True),
    )
    for child in (holding, leaving):
        child.start()
        assert child.pid is not None
    for stop in STOP_SIGNALS:  # while it starts, and while it works
        os.kill(holding.pid or 0, stop)
    wait_for((tmp_path / "a").is_file)
    for stop in STOP_SIGNALS:
        os.kill(holding.pid or 0, stop)
    leaving.join()
    assert holding.is_alive()
    assert children.dead() == [leaving]
    assert cause_of_death(leaving) == "exit code 3"
    holding.terminate()
    holding.join()
    assert cause_of_death(holding) == "killed by SIGKILL"


def test_signals_reach_this_process_as_before() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    child = Children().Process(target=leave, args=(0,), daemon=True)
    child.start()
    child.join()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def start_one(place: str) -> None:
    Children().Process(target=hold, args=(place,), daemon=True).start()


def start_pool(place: str) -> None:
    """As pae study --workers does."""
    ProcessPoolExecutor(2, mp_context=Children()).submit(hold, place)


@pytest.mark.parametrize("start", [start_one, start_pool])
def test_children_of_a_killed_process_end(tmp_path: Path, start: Callable[[str], None]) -> None:
    place = tmp_path / "a"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads
        parent = os.fork()
    if not parent:
        start(str(place))
        time.sleep(600)
        os._exit(0)
    wait_for(place.is_file)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with FileLock(f"{place}.lock", timeout=120):  # only the end of the child lets it go
        pass
