"""Real tasks of the presets with random weights and random batches. Nothing is read or downloaded."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from openpae import config as configs
from openpae.engine.loop import trial_steps
from openpae.plan.estimate import ROOM, largest_fit
from openpae.plan.fakes import AnyTask, Run, build_task, planned_batches, without_files
from openpae.plan.trial import Trial, planned_run, try_run
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from tests.gpu.outcome import NotRun

RUNS: list[type[Any]] = [RefinerRun, TokenizerRun, GeneratorRun]
TINY = ("refiner/tiny", "tokenizer/tiny", "generator/tiny")
FULL = ("refiner/dinov2-l", "tokenizer/dinov2-l-d32", "generator/xl-80ep")
GIB = 2**30


def preset(name: str) -> Run:
    """The run of a preset."""
    run: Run = configs.load_one_of(RUNS, name)
    return run


def all_presets() -> list[str]:
    """The names of all presets of a run."""
    files = sorted(configs.PRESETS.rglob("*.yaml"))
    runs = [file for file in files if configs.read_yaml(file)["kind"].endswith("Run")]
    return [str(file.relative_to(configs.PRESETS).with_suffix("")) for file in runs]


@functools.cache
def planned(name: str) -> tuple[Run, Trial]:
    """The run of a preset with a device batch that fits this GPU by `pae plan`, and its trial.

    Raises:
        NotRun: not one image fits.
    """
    run = planned_run(preset(name))
    trial, free = try_run(run), int(ROOM * torch.cuda.get_device_properties(0).total_memory)
    if trial.peak.total > free:
        fit = largest_fit(run, 1, free, trial)
        if not fit.device_batch:
            raise NotRun(f"does not fit: not one image, by pae plan, in {free / GIB:.1f} GiB")
        run = planned_run(run, device_batch_size=fit.device_batch)
        trial = try_run(run)
    return run, trial


@contextmanager
def real_task(run: Run, device: torch.device) -> Iterator[AnyTask]:
    """Enter a context with the task of a run. A step takes the first and the last device batch.

    Args:
        run: its loop.device is the type of the device.
        device: networks are built on it, which is faster than to move them.
    """
    with without_files():
        with torch.device(device):
            task = build_task(run)
        yield task


def images_of(run: Run) -> int:
    """The images of a step of `real_task`."""
    return sum(map(len, planned_batches(run.loop)))


def timed_steps(task: AnyTask, run: Run, steps: list[int]) -> tuple[float, Any]:
    """Take steps. Returns the seconds of the last one, and the state after it."""
    times, states = [time.perf_counter()], []
    for state in trial_steps(task, run.optim, run.loop, steps):
        wait(task.device)
        times.append(time.perf_counter())
        states = [state]
    return times[-1] - times[-2], states[0]


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_figures(device: torch.device) -> dict[str, float]:
    """The peak of allocated memory since the last reset; nothing on a CPU."""
    return {"peak GiB": torch.cuda.max_memory_allocated(device) / GIB} if device.type == "cuda" else {}
