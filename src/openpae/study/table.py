"""The numbers of a study, and what can be said of differences, orders and curves with few seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openpae.runtime.escape import spreadsheet
from openpae.storage.files import read_json, whole_file
from openpae.study.plan import Plan
from openpae.study.settings import HIGHER_IS_BETTER

Verdict = Literal["shown", "not shown", "contradicted", "agrees", "disagrees"]
"""The last two are of one seed: which way the numbers point, without an error bar."""

MIN_SETTINGS = 5
"""Settings from which on a rank correlation is worth a look."""

MOST_SEEDS = 100
"""Seeds a row above which it does not matter how many it would take."""


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
        records = {name: _record(plan, name) for name in {cell.measure, *cell.own, *cell.judges.values()}}
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
        whole_file(path) as partial,
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


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error, s / sqrt(n); one value has no error."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return float(array.mean()), error


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much better one row is than another."""

    gain: float
    """Difference of the means, positive where the first row is better."""
    stderr: float | None
    """Of the difference; None where a row has one seed."""
    low: float | None
    """Ends of its 95 % interval (Welch's t)."""
    high: float | None
    verdict: Verdict
    reason: str


def compare(
    better: Mapping[int, float], worse: Mapping[int, float], *, higher: bool, paired: bool = False
) -> Comparison:
    """Decide whether a row is better than another (Welch's t interval of the difference of their means).

        gain +- t_{0.975, v} sqrt(s_a^2 / n_a + s_b^2 / n_b)

    Shown: the 95 % interval lies above 0. Contradicted: it lies below 0. Otherwise not shown. A row of one
    seed has no interval: it agrees or disagrees.

    Args:
        better: seed -> value of the row that is said to be better.
        worse: of the other.
        higher: whether higher values are better.
        paired: rows share their models seed by seed, so the interval is that of the differences of a seed.
    """
    if paired:
        better, worse = ({seed: row[seed] for seed in better if seed in worse} for row in (better, worse))
    if not better or not worse:
        return _undecided(math.nan, "not run yet")
    sign = 1.0 if higher else -1.0
    a, b = (sign * np.array(list(row.values()), dtype=np.float64) for row in (better, worse))
    gain = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return _of_one_seed(gain)
    if paired:
        return _decided((a - b).tolist())
    from scipy.stats import t

    parts = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
    error = math.sqrt(sum(parts))
    half = 0.0
    if error:
        freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
        half = float(t.ppf(0.975, freedom)) * error
    verdict = verdict_of(gain - half, gain + half)
    reason = ""
    if verdict == "not shown" and gain:
        spread = math.sqrt((float(a.var(ddof=1)) + float(b.var(ddof=1))) / 2)
        wanted = needed_seeds(gain, spread, more_than=max(len(a), len(b)))
        reason = f"seeds a row that would decide a difference of this size: {wanted}"
    return Comparison(
        gain=gain, stderr=error, low=gain - half, high=gain + half, verdict=verdict, reason=reason
    )


def needed_seeds(gain: float, spread: float, *, more_than: int = 1) -> str:
    """Seeds per row with which a t test at 5 % finds a true difference four times in five: "about 7".

    Power of the two-sided t test of two rows of n: noncentral t with 2 n - 2 degrees of freedom and
    noncentrality gain / spread sqrt(n / 2).
    """
    from scipy.stats import nct, t

    for n in range(more_than + 1, MOST_SEEDS + 1):
        limit, centre = t.ppf(0.975, 2 * n - 2), abs(gain) / spread * math.sqrt(n / 2)
        if nct.sf(limit, 2 * n - 2, centre) >= 0.8:
            return f"about {n}"
    return f"more than {MOST_SEEDS}"


def _undecided(gain: float, reason: str) -> Comparison:
    return Comparison(gain=gain, stderr=None, low=None, high=None, verdict="not shown", reason=reason)


def _of_one_seed(gain: float) -> Comparison:
    one = _undecided(gain, "one seed, which has no error bar")
    return replace(one, verdict="agrees" if gain > 0 else "disagrees")


def verdict_of(low: float, high: float) -> Verdict:
    """What a 95 % interval of a gain says: does it lie above 0, below, or across?"""
    return "shown" if low > 0 else "contradicted" if high < 0 else "not shown"


def _decided(gains: Sequence[float]) -> Comparison:
    """Whether gains, one per seed, lie above 0 (one-sample t interval)."""
    gain, error = mean_error(gains)
    if error is None:
        return _of_one_seed(gain)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(gains) - 1)) * error
    low, high = gain - half, gain + half
    return Comparison(gain=gain, stderr=error, low=low, high=high, verdict=verdict_of(low, high), reason="")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One tokenizer, and how well a generator learns its latents."""

    group: str
    """The tokenizer's setting: seeds of one setting are not independent of each other."""
    metrics: Mapping[str, float]
    quality: float
    """Negative distance of samples: higher is better."""


def points(plan: Plan, names: Sequence[str], quality: str = "gfid") -> list[Point]:
    """Every tokenizer of these studies that was generated from, once, under their most common judging.

    The same tokenizer serves several studies and rows; samplers that differ would make distances that do not
    compare, and of several generators of one tokenizer the first counts.

    Args:
        plan: what was done.
        names: of the studies.
        quality: gfid, or gfid_own; tokenizers without it are left out.
    """
    found: dict[str, Point] = {}
    judged = [(cell, max(cell.judges)) for cell in plan.cells if cell.judges and cell.study in names]
    settings = [repr(plan.stages[cell.judges[step]].settings) for cell, step in judged]
    common = max(set(settings), key=settings.count, default="")
    for (cell, step), own in zip(judged, settings, strict=True):
        judge, measure = _record(plan, cell.judges[step]), _record(plan, cell.measure)
        if own == common and judge and measure and quality in judge["metrics"]:
            metrics = {name: entry["value"] for name, entry in measure["metrics"].items()}
            value = judge["metrics"][quality]["value"]
            point = Point(group=f"{cell.study}/{cell.row}", metrics=metrics, quality=-value)
            found.setdefault(cell.tokenizer, point)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Rank correlation of a metric's goodness with the quality of samples."""

    metric: str
    rho: float
    low: float
    high: float
    over: Mapping[str, tuple[float, float, float]]
    """Another metric -> how much larger rho is than that one's, and the ends of the 95 % interval."""


def correlations(
    found: Sequence[Point],
    metrics: Sequence[str],
    *,
    against: Sequence[str] = (),
    draws: int = 1000,
    seed: int = 0,
) -> list[Correlation]:
    """Spearman's rank correlation with 95 % bootstrap intervals (percentiles) over settings.

    Both sides are turned so that larger is better; rho near 1 means that the better metric goes with the
    better samples. A draw takes whole settings with all their seeds, with replacement.

    Args:
        found: tokenizers; those without a metric are left out for it.
        metrics: which metrics.
        against: metrics whose rho is subtracted, on the same draws.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        Those metrics that all of the tokenizers have; none where there are fewer than five settings, of which
        an interval would say nothing.
    """
    names = list(dict.fromkeys([*metrics, *against]))
    shared = [point for point in found if all(name in point.metrics for name in names)]
    usable = shared if shared else list(found)
    groups = sorted({point.group for point in usable})
    if len(groups) < MIN_SETTINGS:
        return []
    present = [name for name in names if all(name in point.metrics for point in usable)]
    table = {name: np.array([_good(name, point.metrics[name]) for point in usable]) for name in present}
    quality = np.array([point.quality for point in usable])
    members = {g: np.flatnonzero([point.group == g for point in usable]) for g in groups}
    generator = np.random.default_rng(seed)
    picks = [
        np.concatenate([members[groups[i]] for i in generator.integers(len(groups), size=len(groups))])
        for _ in range(draws)
    ]
    ranked = [(pick, _unit_ranks(quality[pick])) for pick in picks]
    sampled = {
        name: np.array([_unit_ranks(x[p]) @ ranks for p, ranks in ranked]) for name, x in table.items()
    }
    rho = {name: spearman(x, quality) for name, x in table.items()}
    result = []
    for name in metrics:
        if name not in rho or math.isnan(rho[name]):
            continue
        low, high = _interval(sampled[name])
        over = {
            other: (rho[name] - rho[other], *_interval(sampled[name] - sampled[other]))
            for other in against
            if other in rho and other != name
        }
        result.append(Correlation(metric=name, rho=rho[name], low=low, high=high, over=over))
    return result


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Rank correlation; equal values share their mean rank. NaN where one side is constant."""
    return float(_unit_ranks(x) @ _unit_ranks(y))


def _unit_ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks of mean 0 and length 1: a product of two is their correlation. NaN where all are equal."""
    from scipy.stats import rankdata

    ranks: NDArray[np.float64] = rankdata(x)
    centred = ranks - ranks.mean()
    norm = float(np.linalg.norm(centred))
    return centred / norm if norm else np.full_like(centred, np.nan)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Middle 95 % of draws; those in which a side is constant say nothing."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _good(metric: str, value: float) -> float:
    return value if metric in HIGHER_IS_BETTER else -value


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """How many times earlier a row reaches the quality with which another one ends."""

    factors: Mapping[int, float]
    """Seed -> steps of the slow row over steps of the fast one until that quality; 0 where it never gets
    there."""
    at_least: frozenset[int]
    """Seeds whose fast row was as good at its first judged step already: a lower bound."""
    comparison: Comparison
    """Of the logarithms of the factors with 0."""


def speed_up(
    fast: Mapping[int, Sequence[tuple[int, float]]],
    slow: Mapping[int, Sequence[tuple[int, float]]],
    *,
    higher: bool = False,
) -> SpeedUp | None:
    """The convergence factor of Fig. 1, seed by seed; between judged steps the curve is a straight line.

    Args:
        fast: seed -> (step, value), in order.
        slow: the same of the row that is said to be slower.
        higher: whether higher values are better.

    Returns:
        None where no seed has both curves.
    """
    factors, at_least = {}, set()
    for seed in sorted(fast.keys() & slow.keys()):
        end, goal = slow[seed][-1]
        step = first_reach(fast[seed], goal, higher=higher)
        factors[seed] = 0.0 if step is None else end / step
        if step == fast[seed][0][0]:
            at_least.add(seed)
    if not factors:
        return None
    if 0.0 in factors.values():
        verdict = _undecided(math.nan, "not every seed reaches it")
    elif at_least:
        verdict = _undecided(math.nan, "lower bounds have no interval; judge earlier steps")
    else:
        verdict = _decided([math.log(factor) for factor in factors.values()])
    return SpeedUp(factors=factors, at_least=frozenset(at_least), comparison=verdict)


def first_reach(curve: Sequence[tuple[int, float]], goal: float, *, higher: bool) -> float | None:
    """First step at which a curve is as good as `goal`, straight between its points; None if never."""
    sign = 1.0 if higher else -1.0
    before: tuple[int, float] | None = None
    for step, value in curve:
        if sign * (value - goal) >= 0:
            if before is None or value == before[1]:
                return float(step)
            return before[0] + (step - before[0]) * (goal - before[1]) / (value - before[1])
        before = step, value
    return None


def cost(plan: Plan, names: Sequence[str]) -> tuple[float, list[str]]:
    """Seconds of the stages made for the rows of these studies, each once, and versions of all code used.

    Images, features, refiner and reference, which rows of several studies share, are not in the time; their
    code is among the versions.
    """
    own = {name for cell in plan.cells if cell.study in names for name in cell.own}
    seconds = sum(record["seconds"] for name in own if (record := _record(plan, name)))
    return seconds, sorted({record["commit"] for name in plan.stages if (record := _record(plan, name))})


def _record(plan: Plan, name: str) -> dict[str, Any] | None:
    file = plan.places.record(name)
    return read_json(file) if file.is_file() else None
