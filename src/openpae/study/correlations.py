"""Rank correlations of tokenizer metrics with sample quality, bootstrapped over settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openpae.runtime.extras import needs
from openpae.study.plan import Plan
from openpae.study.settings import HIGHER_IS_BETTER

MIN_SETTINGS = 5
"""Fewest settings for a rank correlation."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One tokenizer, and the quality of samples from its latents."""

    group: str
    """The tokenizer's setting. Seeds of one setting are not independent."""
    metrics: Mapping[str, float]
    quality: float
    """Negative Frechet distance of samples; higher is better."""


def points(plan: Plan, names: Sequence[str], quality: str = "gfid") -> list[Point]:
    """Collect each tokenizer of these studies that has a generator, once.

    Distances under different evaluation settings are not comparable, so only the most common settings count.
    Of several generators of one tokenizer the first counts.

    Args:
        plan: an executed plan.
        names: names of the studies.
        quality: gfid or gfid_own; tokenizers without it are left out.
    """
    by_tokenizer: dict[str, Point] = {}
    evaluated = [(run, max(run.evaluations)) for run in plan.runs if run.evaluations and run.study in names]
    settings = [repr(plan.stages[run.evaluations[step]].settings) for run, step in evaluated]
    common = max(set(settings), key=settings.count, default="")
    for (run, step), own in zip(evaluated, settings, strict=True):
        samples, measure = plan.record(run.evaluations[step]), plan.record(run.measure)
        if own == common and samples and measure and quality in samples["metrics"]:
            metrics = {name: entry["value"] for name, entry in measure["metrics"].items()}
            value = samples["metrics"][quality]["value"]
            point = Point(group=f"{run.study}/{run.row}", metrics=metrics, quality=-value)
            by_tokenizer.setdefault(run.tokenizer, point)
    return list(by_tokenizer.values())


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Rank correlation of a metric with sample quality, and its 95 % interval."""

    metric: str
    rho: float
    low: float
    high: float
    over: Mapping[str, tuple[float, float, float]]
    """Another metric -> difference of both rhos, and the ends of its 95 % interval."""


def correlations(
    tokenizers: Sequence[Point],
    metrics: Sequence[str],
    *,
    against: Sequence[str] = (),
    draws: int = 1000,
    seed: int = 0,
) -> list[Correlation]:
    """Spearman's rank correlation with 95 % bootstrap intervals (percentiles) over settings.

    The sign of each metric is changed so that larger is better: rho near 1 means that a better metric goes
    with better samples. A bootstrap draw takes settings with all their seeds, with replacement.

    Args:
        tokenizers: points; if some have all metrics, the others are left out.
        metrics: names of metrics.
        against: metrics whose rho is subtracted, on the same draws.
        draws: number of bootstrap draws.
        seed: seed of the draws.

    Returns:
        One entry for each metric that all points have; none for fewer than five settings.
    """
    names = list(dict.fromkeys([*metrics, *against]))
    shared = [point for point in tokenizers if all(name in point.metrics for name in names)]
    usable = shared or list(tokenizers)
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
    with needs("eval", "a correlation of a study"):
        from scipy.stats import rankdata

    with np.errstate(invalid="ignore", divide="ignore"):
        correlations: NDArray[np.float64] = np.corrcoef(rankdata(columns, axis=0), rowvar=False)
    return correlations[-1, :-1]


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Middle 95 % of the draws, without those where a side is constant (NaN)."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _good(metric: str, value: float) -> float:
    return value if metric in HIGHER_IS_BETTER else -value
