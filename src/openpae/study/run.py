"""`pae study`: do the stages of a plan, in one process or several, and write what came out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from openpae.runtime import processes
from openpae.runtime.children import Children
from openpae.runtime.provenance import version
from openpae.runtime.signals import Stopped
from openpae.storage.files import atomic_file
from openpae.study.once import run_stage
from openpae.study.page import study_page, study_text
from openpae.study.plan import Plan
from openpae.study.rehearse import Estimate, estimates
from openpae.study.settings import Study
from openpae.study.stage import Stage, StageLayout
from openpae.study.table import collect, write_table

Log = Callable[[str], None]


def run_plan(plan: Plan, *, workers: int = 1, command: str = "", tell: Log = print) -> list[str]:
    """Do every stage that is not done, then write tables and reports; also where it is stopped.

    A stage whose training is not finite is told and left out with what needs it; all others go on.

    Args:
        plan: what to do.
        workers: processes. Each has its share of the threads, and a GPU of its own where there are several.
        command: how it was called; the report repeats it.
        tell: is told what is done.

    Returns:
        What failed, in words.

    Raises:
        Stopped, KeyboardInterrupt: told to stop; tables and reports are written, the same command goes on.
        ValueError: several workers under torchrun.
        OSError: a process died, of want of memory for one.
    """
    if workers > 1 and processes.world_size() > 1:
        raise ValueError(
            f"workers must be 1 under torchrun, whose processes share each stage, got {workers}; "
            "take one of both"
        )
    board = _Board(plan, tell, workers)
    try:
        if workers == 1:
            _one_by_one(plan, board)
        else:
            _in_processes(plan, board, workers)
    finally:
        if processes.is_rank0():
            write_results(plan, command)
    return [f"{plan.stages[name].label} ({name}): {error}" for name, error in board.failed.items()]


def write_results(plan: Plan, command: str) -> list[Path]:
    """Tables and reports of what is done: a folder per study, and for several studies one of all; the
    reports."""
    groups: dict[str, tuple[Study, ...]] = {study.name: (study,) for study in plan.studies}
    if len(plan.studies) > 1:
        groups["all"] = plan.studies
    pages = []
    for name, studies in groups.items():
        folder = plan.places.out / name
        folder.mkdir(parents=True, exist_ok=True)
        results = collect(plan, [study.name for study in studies])
        write_table(results, folder / "results.csv")
        with atomic_file(folder / "results.md") as partial:
            partial.write_text(
                study_text(plan, studies, results, command), encoding="utf-8", errors="backslashreplace"
            )
        study_page(plan, studies, results, command).write(folder / "report.html")
        pages.append(folder / "report.html")
    return pages


def describe_plan(plan: Plan, known: Mapping[str, Estimate], workers: int) -> str:
    """The plan as text: what is done, what is to be done, and how long it takes."""
    open_stages = [stage for stage in plan.stages.values() if not plan.places.record(stage.id).is_file()]
    lines = [f"{len(plan.stages)} stages, {len(plan.stages) - len(open_stages)} of them done"]
    for stage in plan.stages.values():
        if plan.places.record(stage.id).is_file():
            told = "done"
        else:
            estimate = known.get(stage.id)
            told = "?" if estimate is None else _duration(estimate.seconds)
        lines.append(f"  {told:>8}  {stage.id:30} {stage.label}")
    seconds = sum(estimate.seconds for estimate in known.values())
    rehearsed = sum(estimate.rehearsed for estimate in known.values())
    lines.append(
        f"about {_duration(seconds / workers)} in {workers} process{'es' if workers > 1 else ''}: "
        f"{len(known) - rehearsed} stages timed by others that are done, {rehearsed} by a rehearsal"
    )
    return "\n".join(lines)


class _Board:
    """What is done, what failed, and how long it still takes."""

    def __init__(self, plan: Plan, tell: Log, workers: int) -> None:
        self.plan, self.tell, self.workers = plan, tell, workers
        self.failed: dict[str, str] = {}
        # The first process looks for all: what is done must not change between two glances.
        self.done = processes.on_rank0(
            lambda: {name for name in plan.stages if plan.places.record(name).is_file()}
        )
        self.commit = version()

    def ready(self, running: Sequence[str] = ()) -> Iterator[Stage]:
        """Stages whose inputs are done, in the order of the plan."""
        for name, stage in self.plan.stages.items():
            if name in self.done or name in self.failed or name in running:
                continue
            needed = [below for _, below in stage.inputs if below in self.plan.stages]
            if all(below in self.done for below in needed):
                yield stage

    def finished(self, stage: Stage, record: Mapping[str, Any]) -> None:
        """Count a stage, and tell how long the others take."""
        self.done.add(stage.id)
        if not processes.is_rank0():
            return
        left = estimates(self.plan)
        waiting = len(self.plan.stages) - len(self.done)
        untold = waiting - len(left)
        seconds = sum(estimate.seconds for estimate in left.values()) / self.workers
        rest = f"; about {_duration(seconds)} left" if left else ""
        rest += f"; {untold} stages not yet timed" if untold > 0 else ""
        self.tell(
            f"[{len(self.done)}/{len(self.plan.stages)}] {stage.kind} ({stage.label}): "
            f"{_duration(record['seconds'])}{rest}"
        )

    def fail(self, stage: Stage, error: FloatingPointError) -> None:
        """Leave a stage out."""
        self.failed[stage.id] = str(error)
        if processes.is_rank0():
            self.tell(f"failed: {stage.kind} ({stage.label}): {error}")


def _one_by_one(plan: Plan, board: _Board) -> None:
    while (stage := next(board.ready(), None)) is not None:
        try:
            record = run_stage(stage, plan.places, commit=board.commit, quiet=not sys.stderr.isatty())
        except FloatingPointError as error:
            board.fail(stage, error)
        else:
            board.finished(stage, record)


def _in_processes(plan: Plan, board: _Board, workers: int) -> None:
    context = Children()
    threads = max(1, torch.get_num_threads() // workers)
    running: dict[Future[dict[str, Any]], Stage] = {}
    with (
        _stop_signals() as caught,
        ProcessPoolExecutor(
            workers,
            mp_context=context,
            initializer=_settle,
            initargs=(context.Value("i", 0), threads, _devices()),
        ) as pool,
    ):
        while True:
            free = workers - len(running)
            if not caught:
                waiting = list(board.ready([stage.id for stage in running.values()]))[:free]
                for stage in waiting:
                    running[pool.submit(_work, stage, plan.places, board.commit)] = stage
            if not running:
                break
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool:
                    if not caught:
                        raise OSError(
                            f"a process died at {stage.kind} ({stage.label}); if memory ran out, take fewer "
                            "--workers; the same command goes on"
                        ) from None
                    continue  # it was told to stop before it could listen
                if "stopped" in record:
                    caught.append(signal.SIGINT)
                elif "failed" in record:
                    board.fail(stage, FloatingPointError(record["failed"]))
                else:
                    board.finished(stage, record)
    if caught:
        raise KeyboardInterrupt


def _work(stage: Stage, places: StageLayout, commit: str) -> dict[str, Any]:
    """A stage in a process of its own; what ends it early comes back as a value."""
    try:
        _hear_stop(True)
        return run_stage(stage, places, commit=commit, quiet=True)
    except (Stopped, KeyboardInterrupt):  # its folder is sound, whenever it comes: the same call goes on
        return {"stopped": True}
    except FloatingPointError as error:
        return {"failed": str(error)}
    finally:
        _hear_stop(False)


def _hear_stop(now: bool) -> None:
    """Let SIGINT through, one that has waited too, or let it wait: idle processes must not die of Ctrl-C."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK if now else signal.SIG_BLOCK, {signal.SIGINT})


def _settle(counter: Any, threads: int, devices: Sequence[str]) -> None:
    """Give a new process its threads and its GPU."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    torch.set_num_threads(threads)


def _devices() -> list[str]:
    """Names of the GPUs as the CUDA library knows them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Catch SIGINT and SIGTERM: no new stage is begun. SIGTERM is handed on, as a terminal does Ctrl-C."""
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if caught and signum == signal.SIGINT:  # the second time means now
            raise KeyboardInterrupt
        caught.append(signum)
        if signum == signal.SIGTERM:
            for child in multiprocessing.active_children():
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGINT)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
