"""The numbers of a study, and what can be said of differences, orders and curves with few seeds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from openpae.runtime.escape import spreadsheet
from openpae.storage.files import atomic_file
from openpae.study.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table."""

    study: str
    row: str
    seed: int
    metric: str
    step: int | None
    """Of the generator, for the metrics of its samples."""
    value: float
    stderr: float | None
    """Within this run, over images or repeats; None where the metric gives none."""
    seconds: float
    """Of all stages that were done for this row and seed, without those that all rows share."""
    commit: str
    """Version and commit of the code that measured it."""


def collect(plan: Plan, names: Sequence[str]) -> list[Result]:
    """The numbers of the studies with these names, as far as they are there."""
    found = []
    for cell in plan.cells:
        if cell.study not in names:
            continue
        records = {name: plan.record(name) for name in {cell.measure, *cell.own, *cell.judges.values()}}
        seconds = sum(record["seconds"] for name in cell.own if (record := records[name]))
        for name, step in [(cell.measure, None), *((judge, step) for step, judge in cell.judges.items())]:
            if not (record := records[name]):
                continue
            found += [
                Result(
                    study=cell.study, row=cell.row, seed=cell.seed, metric=metric, step=step,
                    value=entry["value"], stderr=entry["stderr"], seconds=seconds, commit=record["commit"],
                )
                for metric, entry in record["metrics"].items()
            ]  # fmt: skip
    return found


def write_table(results: Sequence[Result], path: Path) -> None:
    """Write results as CSV, whole or not at all; a standard error or step that is not there is empty."""
    with (
        atomic_file(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, [part.name for part in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: spreadsheet(value) for name, value in asdict(result).items()} for result in results
        )


def finals(results: Sequence[Result], study: str, row: str, metric: str) -> dict[int, float]:
    """Seed -> value of a metric, of the generator's last judged step where it has one."""
    found: dict[int, tuple[int, float]] = {}
    for one in results:
        if (one.study, one.row, one.metric) == (study, row, metric):
            step = one.step or 0
            if one.seed not in found or step > found[one.seed][0]:
                found[one.seed] = step, one.value
    return {seed: value for seed, (_, value) in found.items()}


def curves(
    results: Sequence[Result], study: str, row: str, metric: str
) -> dict[int, list[tuple[int, float]]]:
    """Seed -> (step, value) in order."""
    found: dict[int, list[tuple[int, float]]] = {}
    for one in results:
        if (one.study, one.row, one.metric) == (study, row, metric) and one.step is not None:
            found.setdefault(one.seed, []).append((one.step, one.value))
    return {seed: sorted(points) for seed, points in found.items()}


def cost(plan: Plan, names: Sequence[str]) -> tuple[float, list[str]]:
    """Seconds of the stages made for the rows of these studies, each once, and versions of all code used.

    Images, features, refiner and reference, which rows of several studies share, are not in the time; their
    code is among the versions.
    """
    own = {name for cell in plan.cells if cell.study in names for name in cell.own}
    seconds = sum(record["seconds"] for name in own if (record := plan.record(name)))
    return seconds, sorted({record["commit"] for name in plan.stages if (record := plan.record(name))})
