"""The results of a study as a table: collect, write, select."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from openpae.data.images import open_images
from openpae.runtime.escape import spreadsheet
from openpae.storage.files import atomic_file
from openpae.study.plan import Plan
from openpae.study.settings import Study
from openpae.study.verdicts import first_reach


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of results.csv."""

    study: str
    row: str
    seed: int
    metric: str
    step: int | None
    """Step of the generator; None for metrics of the tokenizer."""
    value: float
    stderr: float | None
    """Standard error within this run, over images or repeats; None where the metric has none."""
    seconds: float
    """Seconds of the stages of this row and seed, without the stages that all rows share."""
    commit: str
    """Version and commit of the code."""


def collect(plan: Plan, names: Sequence[str]) -> list[Result]:
    """Collect the results of the studies with these names, as far as they are done."""
    results = []
    for run in plan.runs:
        if run.study not in names:
            continue
        records = {name: plan.record(name) for name in {run.measure, *run.own, *run.evaluations.values()}}
        seconds = sum(record["seconds"] for name in run.own if (record := records[name]))
        for name, step in [(run.measure, None), *((name, step) for step, name in run.evaluations.items())]:
            if not (record := records[name]):
                continue
            results += [
                Result(
                    study=run.study, row=run.row, seed=run.seed, metric=metric, step=step,
                    value=entry["value"], stderr=entry["stderr"], seconds=seconds, commit=record["commit"],
                )
                for metric, entry in record["metrics"].items()
            ]  # fmt: skip
    return results


def write_table(results: Sequence[Result], path: Path) -> None:
    """Write results as CSV, atomically. A missing standard error or step is empty."""
    with (
        atomic_file(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, [part.name for part in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: spreadsheet(value) for name, value in asdict(result).items()} for result in results
        )


def read_table(path: Path) -> list[Result]:
    """Read a results.csv of `write_table`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no results.csv.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}; pae study writes results.csv into its folder")
    names = [part.name for part in fields(Result)]
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path} is no results.csv of pae study: its columns must be {', '.join(names)}")
        try:
            return [_result(line) for line in reader]
        except (TypeError, ValueError) as error:  # TypeError: too few cells
            raise ValueError(f"{path} is damaged in line {reader.line_num}: {error}") from None


def _result(line: Mapping[str, str]) -> Result:
    numbers = {name: float(line[name]) for name in ("value", "stderr", "seconds") if line[name] != ""}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError("value, stderr and seconds must be finite numbers")
    return Result(
        study=line["study"], row=line["row"], seed=int(line["seed"]), metric=line["metric"],
        step=int(line["step"]) if line["step"] else None, value=numbers["value"],
        stderr=numbers.get("stderr"), seconds=numbers["seconds"], commit=line["commit"],
    )  # fmt: skip


def finals(results: Sequence[Result], study: str, row: str, metric: str) -> dict[int, float]:
    """Map each seed to the value of a metric at the last evaluated step."""
    last: dict[int, tuple[int, float]] = {}
    for one in results:
        if (one.study, one.row, one.metric) == (study, row, metric):
            step = one.step or 0
            if one.seed not in last or step > last[one.seed][0]:
                last[one.seed] = step, one.value
    return {seed: value for seed, (_, value) in last.items()}


def curves(
    results: Sequence[Result], study: str, row: str, metric: str
) -> dict[int, list[tuple[int, float]]]:
    """Map each seed to its (step, value) pairs in order of steps."""
    by_seed: dict[int, list[tuple[int, float]]] = {}
    for one in results:
        if (one.study, one.row, one.metric) == (study, row, metric) and one.step is not None:
            by_seed.setdefault(one.seed, []).append((one.step, one.value))
    return {seed: sorted(points) for seed, points in by_seed.items()}


def epochs_until(
    plan: Plan, study: Study, results: Sequence[Result], goal: float
) -> dict[str, dict[int, float | None]]:
    """Map each row and seed to the epochs after which gFD is at most `goal` (EP@k of arXiv:2605.18324).

    An epoch is as many samples of a generator's training as there are images. Curves are linear between
    evaluated steps. None: not reached.
    """
    epochs: dict[str, dict[int, float | None]] = {}
    for run in plan.runs:
        curve = curves(results, study.name, run.row, "gfid").get(run.seed)
        if run.study != study.name or run.generator is None or curve is None:
            continue
        generator = plan.stages[run.generator]
        latents = plan.stages[dict(generator.inputs)["latents"]]
        count = len(open_images(plan.layout.folder(dict(latents.inputs)["images"])))
        step = first_reach(curve, goal, higher=False)
        size = generator.settings.loop.global_batch_size
        epochs.setdefault(run.row, {})[run.seed] = None if step is None else step * size / count
    return epochs


def cost(plan: Plan, names: Sequence[str]) -> tuple[float, list[str]]:
    """Return the seconds of the rows' own stages, each counted once, and the code versions of all stages.

    The seconds leave out the stages that all rows share: images, features, refiner and reference.
    """
    own = {name for run in plan.runs if run.study in names for name in run.own}
    seconds = sum(record["seconds"] for name in own if (record := plan.record(name)))
    return seconds, sorted({record["commit"] for name in plan.stages if (record := plan.record(name))})
