"""Verdicts on claims from the results of a study: intervals, needed seeds, speed-ups.

`page.decided` calls `compare` for each claim, `page.ranks` calls `verdict_of` for each rank correlation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openpae.runtime.extras import needs

Verdict = Literal["shown", "not shown", "contradicted", "agrees", "disagrees"]
"""The last two are for one seed: the sign of the difference, without an error bar."""

POWER = 0.8
"""Share of studies that are to show a difference of the smallest visible size."""

MOST_SEEDS = 100
"""Largest number of seeds per row that `seeds_for` tries."""


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, s / sqrt(n); the error of one value is None."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return float(array.mean()), error


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Difference between two rows, and its verdict."""

    gain: float
    """Difference of the means; positive if the first row is better."""
    stderr: float | None
    """Standard error of the difference; None if a row has one seed."""
    low: float | None
    """Lower end of the 95 % interval (Welch's t; of paired values, a t interval of the differences)."""
    high: float | None
    """Upper end."""
    verdict: Verdict
    reason: str


def compare(
    better: Mapping[int, float], worse: Mapping[int, float], *, higher: bool, paired: bool = False
) -> Comparison:
    """Decide whether one row is better than another, by the 95 % interval of the difference of the means.

        Welch     gain +- t_{0.975, v} sqrt(s_a^2 / n_a + s_b^2 / n_b)
        paired    gain +- t_{0.975, n - 1} s_d / sqrt(n),   s_d of the differences per seed

    Shown: the 95 % interval lies above 0. Contradicted: it lies below 0. Otherwise not shown. A row of one
    seed has no interval: it agrees or disagrees.

    Args:
        better: seed -> value, of the row that is claimed to be better.
        worse: seed -> value, of the other row.
        higher: whether higher values are better.
        paired: both rows use the same models, so the differences per seed give the interval.
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
    low, high = _interval_of_means(a, b)
    verdict = verdict_of(low, high)
    reason = ""
    if verdict == "not shown" and gain:
        spread = math.sqrt((float(a.var(ddof=1)) + float(b.var(ddof=1))) / 2)
        wanted = needed_seeds(gain, spread, more_than=max(len(a), len(b)))
        reason = f"seeds a row that would decide a difference of this size: {wanted}"
    error = math.sqrt(float(a.var(ddof=1)) / len(a) + float(b.var(ddof=1)) / len(b))
    return Comparison(gain=gain, stderr=error, low=low, high=high, verdict=verdict, reason=reason)


def _interval_of_means(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Welch's 95 % interval of mean(a) - mean(b); a single point if neither row varies."""
    with needs("eval", "a verdict of a study"):
        from scipy.stats import ttest_ind

    gain = float(a.mean() - b.mean())
    if not (a.var() or b.var()):
        return gain, gain
    interval = ttest_ind(a, b, equal_var=False).confidence_interval()
    return float(interval.low), float(interval.high)


def needed_seeds(gain: float, spread: float, *, more_than: int = 1) -> str:
    """Seeds per row that give a t test at 5 % a power of 80 %, as text: "about 7"."""
    wanted = seeds_for(gain, spread, least=more_than + 1)
    return f"more than {MOST_SEEDS}" if wanted is None else f"about {wanted}"


def visible_difference(spread: float, seeds: int, *, paired: bool = False) -> float:
    """Smallest true difference of two rows that a t test at 5 % shows with a power of 80 %.

        paired       spread = std of the differences per seed:  ncp spread / sqrt(n),       n - 1 degrees
        two samples  spread = std of a row over seeds:          ncp spread sqrt(2 / n),  2 n - 2 degrees

    ncp is the noncentrality at which the noncentral t passes the 97.5 % point of t in 80 % of cases.

    Args:
        spread: standard deviation over seeds.
        seeds: n, seeds of each row, at least 2.
        paired: whether the rows are compared seed by seed.
    """
    with needs("eval", "a verdict of a study"):
        from scipy.optimize import brentq
        from scipy.stats import nct, t

    degrees = seeds - 1 if paired else 2 * seeds - 2
    limit = t.ppf(0.975, degrees)
    centre = float(brentq(lambda x: nct.sf(limit, degrees, x) - POWER, 0.0, 2 * limit + 10))
    return centre * spread * math.sqrt((1 if paired else 2) / seeds)


def seeds_for(difference: float, spread: float, *, paired: bool = False, least: int = 2) -> int | None:
    """Fewest seeds a row, from `least` on, with which a difference is visible; None above `MOST_SEEDS`."""
    tried = range(least, MOST_SEEDS + 1)
    return next((n for n in tried if visible_difference(spread, n, paired=paired) <= abs(difference)), None)


def _undecided(gain: float, reason: str) -> Comparison:
    return Comparison(gain=gain, stderr=None, low=None, high=None, verdict="not shown", reason=reason)


def _of_one_seed(gain: float) -> Comparison:
    one = _undecided(gain, "one seed, which has no error bar")
    return replace(one, verdict="agrees" if gain > 0 else "disagrees")


def verdict_of(low: float, high: float) -> Verdict:
    """Verdict on a 95 % interval of a gain: above 0, below 0, or across 0."""
    return "shown" if low > 0 else "contradicted" if high < 0 else "not shown"


def _decided(gains: Sequence[float]) -> Comparison:
    """Decide whether gains, one per seed, lie above 0 (one-sample t interval)."""
    gain, error = mean_error(gains)
    if error is None:
        return _of_one_seed(gain)
    with needs("eval", "a verdict of a study"):
        from scipy.stats import ttest_1samp

    interval = ttest_1samp(gains, 0.0).confidence_interval() if error else None
    low, high = (gain, gain) if interval is None else (float(interval.low), float(interval.high))
    return Comparison(gain=gain, stderr=error, low=low, high=high, verdict=verdict_of(low, high), reason="")


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """How many times fewer steps a row needs for the final quality of another row."""

    factors: Mapping[int, float]
    """Seed -> steps of the slow row / steps of the fast row at that quality; 0 if it is never reached."""
    at_least: frozenset[int]
    """Seeds that reach it at the first evaluated step, so that the factor is a lower bound."""
    comparison: Comparison
    """Comparison of the logarithms of the factors with 0."""


def speed_up(
    fast: Mapping[int, Sequence[tuple[int, float]]],
    slow: Mapping[int, Sequence[tuple[int, float]]],
    *,
    higher: bool = False,
) -> SpeedUp | None:
    """Convergence factor of Fig. 1 per seed; curves are linear between evaluated steps.

    Args:
        fast: seed -> (step, value) pairs in order.
        slow: the same for the row that is claimed to be slower.
        higher: whether higher values are better.

    Returns:
        None if no seed has both curves.
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
        verdict = _undecided(math.nan, "lower bounds have no interval; evaluate earlier steps")
    else:
        verdict = _decided([math.log(factor) for factor in factors.values()])
    return SpeedUp(factors=factors, at_least=frozenset(at_least), comparison=verdict)


def first_reach(curve: Sequence[tuple[int, float]], goal: float, *, higher: bool) -> float | None:
    """First step at which a curve reaches `goal`, linear between its points; None if never."""
    sign = 1.0 if higher else -1.0
    before: tuple[int, float] | None = None
    for step, value in curve:
        if sign * (value - goal) >= 0:
            if before is None or value == before[1]:
                return float(step)
            return before[0] + (step - before[0]) * (goal - before[1]) / (value - before[1])
        before = step, value
    return None
