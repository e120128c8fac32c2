"""Which metrics of tokenizers go with good samples: rank correlations, bootstrapped over settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openpae.study.plan import Plan
from openpae.study.settings import HIGHER_IS_BETTER

MIN_SETTINGS = 5
"""Settings from which on a rank correlation is worth a look."""


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
        judge, measure = plan.record(cell.judges[step]), plan.record(cell.measure)
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
    columns = np.column_stack([*table.values(), quality])
    draws_of = np.array([_rank_correlations(columns[pick]) for pick in picks])
    sampled = dict(zip(table, draws_of.T, strict=True))
    rho = dict(zip(table, map(float, _rank_correlations(columns)), strict=True))
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


def _rank_correlations(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation of the last column with each other one; NaN where a side is constant."""
    from scipy.stats import rankdata

    with np.errstate(invalid="ignore", divide="ignore"):
        correlations: NDArray[np.float64] = np.corrcoef(rankdata(columns, axis=0), rowvar=False)
    return correlations[-1, :-1]


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Middle 95 % of draws; those in which a side is constant say nothing."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _good(metric: str, value: float) -> float:
    return value if metric in HIGHER_IS_BETTER else -value
