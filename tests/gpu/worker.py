"""The process that computes. It imports torch; the process that starts it does not.

A check that ends its process, or leaves the GPU in an error, costs this process and no other check. A check
that takes too long is stopped with its process.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import time
import traceback
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

START = 180.0
"""Seconds in which a process must start."""
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    result: str
    """passed, failed or "not run"."""
    reason: str = ""
    """Why it failed or did not run."""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""


@dataclass(frozen=True)
class Planned:
    """A check as the starting process knows it."""

    name: str
    limit: float
    deterministic: bool


class Worker:
    """A process that runs checks one by one.

    Args:
        device: auto, cuda or cpu.
        deterministic: its libraries use deterministic algorithms.

    Raises:
        ValueError: there is no such device, or the process does not start.
    """

    def __init__(self, device: str, *, deterministic: bool) -> None:
        self.deterministic, self._usable = deterministic, True
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, device, deterministic))
        self._process.start()
        child.close()  # so that the end of the process ends the pipe
        answer = self._receive(START)
        if not isinstance(answer, tuple):
            self.kill()
            raise ValueError(answer or "the process that computes did not start")
        self.facts: dict[str, Any] = answer[0]
        """Device, versions and commit."""
        self.checks: list[Planned] = answer[1]

    @property
    def alive(self) -> bool:
        """Whether it takes further checks."""
        return self._usable and self._process.is_alive()

    def run(self, name: str, seconds: float) -> Result:
        """Run a check for at most so many seconds."""
        start = time.monotonic()
        self._pipe.send(name)
        answer = self._receive(seconds)
        if answer is not None:
            result, self._usable = answer
            assert isinstance(result, Result)
            return result
        took = time.monotonic() - start
        stopped = self._process.is_alive()
        self.kill()
        if stopped:
            return Result(name, "not run", f"no time left: stopped after {took:.0f} s", took)
        return Result(name, "failed", f"its process ended with exit code {self._process.exitcode}", took)

    def stop(self) -> None:
        """Let the process end."""
        if self.alive:
            self._pipe.send(None)
            self._process.join(10)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._usable = False
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, seconds: float) -> Any:
        """The next message; None if there is none in this time or the process has ended."""
        try:
            return self._pipe.recv() if self._pipe.poll(seconds) else None
        except (EOFError, OSError):
            self._process.join(10)
            return None


def _serve(pipe: Connection, device_name: str, deterministic: bool) -> None:
    """Run the checks that the pipe names, until one leaves the GPU in an error."""
    if deterministic:
        os.environ[_CUBLAS] = ":4096:8"  # read when the library starts
    import torch

    from openpae.runtime.device import pick_device
    from tests.gpu.checks import all_checks

    try:
        device = pick_device(device_name)
    except ValueError:
        pipe.send("--device is cuda, but torch sees no GPU; use auto or cpu")
        return
    torch.backends.cudnn.allow_tf32 = False
    checks = {check.name: check for check in all_checks(device)}
    pipe.send(
        (_facts(device), [Planned(check.name, check.limit, check.deterministic) for check in checks.values()])
    )
    usable = True
    while usable and (name := pipe.recv()) is not None:
        start = time.monotonic()
        result = result_of(name, checks[name].run, device)
        usable = _clean(device)
        pipe.send((replace(result, seconds=time.monotonic() - start), usable))


def result_of(name: str, check: Any, device: Any) -> Result:
    """Run a check and return its row. Errors become a reason."""
    from tests.gpu.outcome import NotRun

    try:
        outcome = check(device)
    except NotRun as reason:
        return Result(name, "not run", str(reason))
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        return Result(name, "failed", f"{type(error).__name__}: {first[0]}", traceback=traceback.format_exc())
    figures = {name: _finite(value) for name, value in outcome.figures.items()}
    return Result(
        name, "failed" if outcome.problems else "passed", "; ".join(outcome.problems), figures=figures
    )


def _finite(value: Any) -> Any:
    """A figure as JSON can hold it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _clean(device: Any) -> bool:
    """Free the memory of a check. Returns whether the GPU still works."""
    import torch

    gc.collect()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    except RuntimeError:  # an error of a kernel stays for the rest of the process
        return False
    return True


def _facts(device: Any) -> dict[str, Any]:
    """Device, versions and commit, as plain data."""
    import torch

    from openpae.runtime.device import device_name
    from openpae.runtime.provenance import package_versions, version

    facts: dict[str, Any] = {"device": device_name(device), "type": device.type, "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return facts | {"commit": version(), "versions": package_versions()}
