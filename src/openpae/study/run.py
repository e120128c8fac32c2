"""Run the stages of a plan in one or more processes, and write tables and reports."""

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
from openpae.storage.outputs import check_outputs
from openpae.study.once import run_stage
from openpae.study.page import study_page, study_text
from openpae.study.plan import Plan
from openpae.study.rehearse import Estimate, estimates
from openpae.study.settings import Study
from openpae.study.stage import Stage, StageLayout
from openpae.study.table import collect, read_table, write_table

Log = Callable[[str], None]


def run_plan(plan: Plan, *, workers: int = 1, command: str = "", log: Log = print) -> list[str]:
    """Run every stage that is not done, then write tables and reports, also after a signal.

    A stage with non-finite training fails. The stages that need it are left out; the others run.

    Args:
        plan: the plan.
        workers: number of processes; they divide the threads, and the GPUs if there are several.
        command: command line for the report.
        log: called with a line for each stage.

    Returns:
        One message for each stage that failed.

    Raises:
        Stopped, KeyboardInterrupt: after a signal; tables and reports are written, the same call resumes.
        ValueError: there are several workers under torchrun.
        OSError: a process died, for example out of memory.
    """
    if workers > 1 and processes.world_size() > 1:
        raise ValueError(
            f"workers must be 1 under torchrun, whose processes share each stage, got {workers}; "
            "take one of both"
        )
    board = _Board(plan, log, workers)
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
    """Write tables and a report for each study, and for all studies together; return the reports."""
    pages = []
    for name, studies in _groups(plan).items():
        folder = plan.layout.out / name
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


def check_results(plan: Plan, inputs: Sequence[Path | None]) -> None:
    """Refuse result files that `write_results` did not write.

    Raises:
        ValueError, NotADirectoryError: see `check_outputs`.
    """
    for name in _groups(plan):
        folder = plan.layout.out / name
        files = [folder / file for file in ("results.csv", "results.md", "report.html")]
        try:
            read_table(files[0])
        except (OSError, ValueError):
            ours: list[Path] = []
        else:
            ours = files
        check_outputs(*files, into=folder, inputs=inputs, own=ours)


def _groups(plan: Plan) -> dict[str, tuple[Study, ...]]:
    """The studies of each report: every one, and all together if there are several."""
    groups: dict[str, tuple[Study, ...]] = {study.name: (study,) for study in plan.studies}
    return groups | ({"all": plan.studies} if len(plan.studies) > 1 else {})


def describe_plan(plan: Plan, known: Mapping[str, Estimate], workers: int) -> str:
    """Return the plan as text: the state or the estimated time of each stage, and the total time."""
    open_stages = [stage for stage in plan.stages.values() if not plan.layout.record(stage.id).is_file()]
    lines = [f"{len(plan.stages)} stages, {len(plan.stages) - len(open_stages)} of them done"]
    for stage in plan.stages.values():
        if plan.layout.record(stage.id).is_file():
            state = "done"
        else:
            estimate = known.get(stage.id)
            state = "?" if estimate is None else _duration(estimate.seconds)
        lines.append(f"  {state:>8}  {stage.id:30} {stage.label}")
    seconds = sum(estimate.seconds for estimate in known.values())
    rehearsed = sum(estimate.rehearsed for estimate in known.values())
    lines.append(
        f"about {_duration(seconds / workers)} in {workers} process{'es' if workers > 1 else ''}: "
        f"{len(known) - rehearsed} stages timed by others that are done, {rehearsed} by a rehearsal"
    )
    return "\n".join(lines)


class _Board:
    """The finished and failed stages, and the time left."""

    def __init__(self, plan: Plan, log: Log, workers: int) -> None:
        self.plan, self.log, self.workers = plan, log, workers
        self.failed: dict[str, str] = {}
        # Rank 0 looks for all ranks, so that all see the same stages as done.
        self.done = processes.on_rank0(
            lambda: {name for name in plan.stages if plan.layout.record(name).is_file()}
        )
        self.commit = version()

    def ready(self, running: Sequence[str] = ()) -> Iterator[Stage]:
        """Yield the stages whose inputs are done, in the order of the plan."""
        for name, stage in self.plan.stages.items():
            if name in self.done or name in self.failed or name in running:
                continue
            needed = [below for _, below in stage.inputs if below in self.plan.stages]
            if all(below in self.done for below in needed):
                yield stage

    def finished(self, stage: Stage, record: Mapping[str, Any]) -> None:
        """Count a stage, and log the time left."""
        self.done.add(stage.id)
        if not processes.is_rank0():
            return
        left = estimates(self.plan)
        waiting = len(self.plan.stages) - len(self.done)
        unknown = waiting - len(left)
        seconds = sum(estimate.seconds for estimate in left.values()) / self.workers
        rest = f"; about {_duration(seconds)} left" if left else ""
        rest += f"; {unknown} stages not yet timed" if unknown > 0 else ""
        self.log(
            f"[{len(self.done)}/{len(self.plan.stages)}] {stage.kind} ({stage.label}): "
            f"{_duration(record['seconds'])}{rest}"
        )

    def fail(self, stage: Stage, error: FloatingPointError) -> None:
        """Mark a stage as failed."""
        self.failed[stage.id] = str(error)
        if processes.is_rank0():
            self.log(f"failed: {stage.kind} ({stage.label}): {error}")


def _one_by_one(plan: Plan, board: _Board) -> None:
    while (stage := next(board.ready(), None)) is not None:
        try:
            record = run_stage(stage, plan.layout, commit=board.commit, quiet=not sys.stderr.isatty())
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
            initializer=_init_worker,
            initargs=(context.Value("i", 0), threads, _devices()),
        ) as pool,
    ):
        while True:
            free = workers - len(running)
            if not caught:
                waiting = list(board.ready([stage.id for stage in running.values()]))[:free]
                for stage in waiting:
                    running[pool.submit(_work, stage, plan.layout, board.commit)] = stage
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
                    continue  # the signal came before its handler was set
                if "stopped" in record:
                    caught.append(signal.SIGINT)
                elif "failed" in record:
                    board.fail(stage, FloatingPointError(record["failed"]))
                else:
                    board.finished(stage, record)
    if caught:
        raise KeyboardInterrupt


def _work(stage: Stage, layout: StageLayout, commit: str) -> dict[str, Any]:
    """Run a stage in a worker process; return an early end as a value."""
    try:
        _accept_sigint(True)
        return run_stage(stage, layout, commit=commit, quiet=True)
    except (Stopped, KeyboardInterrupt):  # the folder stays valid: the same call resumes
        return {"stopped": True}
    except FloatingPointError as error:
        return {"failed": str(error)}
    finally:
        _accept_sigint(False)


def _accept_sigint(accept: bool) -> None:
    """Unblock SIGINT, or block it: Ctrl-C must not kill idle workers. A blocked SIGINT arrives later."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK if accept else signal.SIG_BLOCK, {signal.SIGINT})


def _init_worker(counter: Any, threads: int, devices: Sequence[str]) -> None:
    """Set the threads and the GPU of a new worker."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    torch.set_num_threads(threads)


def _devices() -> list[str]:
    """Return the names of the GPUs for CUDA_VISIBLE_DEVICES."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Record SIGINT and SIGTERM, so that no new stage starts. Pass SIGTERM on to the workers as SIGINT."""
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if caught and signum == signal.SIGINT:  # the second Ctrl-C stops at once
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
