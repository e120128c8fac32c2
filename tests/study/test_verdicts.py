"""Verdicts, intervals and speed-ups, compared with SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from openpae import config as configs
from openpae.study.page import decided
from openpae.study.settings import Study
from openpae.study.verdicts import compare, first_reach, mean_error, needed_seeds, speed_up, verdict_of
from tests.study.conftest import result


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_verdict_is_that_of_welchs_interval() -> None:
    a, b = by_seed(2.0, 2.3, 1.9, 2.2), by_seed(2.6, 2.5, 2.9)
    comparison = compare(a, b, higher=False)
    interval = stats.ttest_ind(list(b.values()), list(a.values()), equal_var=False).confidence_interval(0.95)
    assert (comparison.low, comparison.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert comparison.gain == pytest.approx(np.mean(list(b.values())) - np.mean(list(a.values())))
    assert comparison.verdict == "shown"
    assert compare(b, a, higher=False).verdict == "contradicted"
    assert compare(b, a, higher=True).verdict == "shown"
    assert compare(by_seed(1.0, 2.0), by_seed(1.2, 2.1), higher=True).verdict == "not shown"


def test_rows_of_the_same_models_are_compared_seed_by_seed() -> None:
    """The seeds are far apart, their differences alike: the paired interval sees it, Welch's does not."""
    a, b = by_seed(10.0, 20.0, 30.0), {2: 31.1, 0: 11.0, 1: 20.9, 7: 500.0}
    interval = stats.ttest_1samp([1.0, 0.9, 1.1], 0).confidence_interval(0.95)
    comparison = compare(a, b, higher=False, paired=True)
    assert (comparison.low, comparison.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert comparison.verdict == "shown"
    assert compare(a, {seed: b[seed] for seed in a}, higher=False).verdict == "not shown"
    study = configs.load(Study, "study/table6-small")
    results = [result(study, row, seed, a[seed] + i) for i, row in enumerate(study.rows) for seed in a]
    assert {comparison.verdict for _, comparison in decided(study, results)} == {"contradicted"}
    assert {comparison.stderr for _, comparison in decided(study, results)} == {0.0}


def test_without_an_error_bar_nothing_is_shown() -> None:
    one = compare(by_seed(1.0), by_seed(2.0, 2.1), higher=False)
    assert (one.verdict, one.reason) == ("agrees", "one seed, which has no error bar")
    assert one.gain == pytest.approx(1.05)
    assert compare(by_seed(1.0), by_seed(2.0, 2.1), higher=True).verdict == "disagrees"
    assert compare({}, by_seed(2.0), higher=False).reason == "not run yet"
    assert compare(by_seed(1.0), {3: 2.0}, higher=False, paired=True).reason == "not run yet"


def test_intervals_of_means_are_as_wide_as_students_t_says() -> None:
    """Of differences, one per seed, and of two rows (Welch)."""
    gains = [0.3, 1.1, 0.4, 0.9]
    mean, half = np.mean(gains), stats.t.ppf(0.975, 3) * np.std(gains, ddof=1) / 2
    comparison = compare(dict(enumerate(gains)), dict.fromkeys(range(4), 0.0), higher=True, paired=True)
    assert (comparison.low, comparison.high) == pytest.approx((mean - half, mean + half))
    a, b = {0: 3.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 1.5}
    parts = [np.var([*row.values()], ddof=1) / len(row) for row in (a, b)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    gain = np.mean([*a.values()]) - np.mean([*b.values()])
    two = compare(a, b, higher=True)
    assert (two.gain, two.low, two.high) == pytest.approx((gain, gain - half, gain + half))
    assert verdict_of(two.low or 0, two.high or 0) == two.verdict


def test_needed_seeds_are_those_of_the_t_test() -> None:
    """Two-sided 5 %, power 80 %, as tables of the t test have it: 17 and 64 per group for differences of one
    standard deviation and of half of one; never as few as there are."""
    assert needed_seeds(1.0, 1.0) == needed_seeds(-1.0, 1.0) == "about 17"
    assert needed_seeds(0.5, 1.0) == "about 64"
    assert needed_seeds(100.0, 1.0, more_than=3) == "about 4"
    assert needed_seeds(0.01, 1.0) == "more than 100"
    kept = compare(by_seed(1.0, 2.0, 3.0), by_seed(3.0, 4.0, 5.5), higher=False)
    assert kept.verdict == "not shown"
    assert kept.reason.endswith(": about 6")


def test_mean_error_is_numpys() -> None:
    values = [1.0, 2.0, 4.0]
    assert mean_error(values) == pytest.approx((np.mean(values), stats.sem(values)))
    assert mean_error([3.0]) == (3.0, None)


def test_a_goal_is_reached_on_the_straight_line_between_two_steps() -> None:
    curve = [(100, 50.0), (200, 30.0), (400, 10.0)]
    assert first_reach(curve, 20.0, higher=False) == 300
    assert first_reach(curve, 50.0, higher=False) == 100
    assert first_reach(curve, 60.0, higher=False) == 100
    assert first_reach(curve, 9.0, higher=False) is None
    assert first_reach([(100, 1.0), (200, 3.0)], 2.0, higher=True) == 150


def test_the_speed_up_is_that_of_the_final_quality() -> None:
    slow = {seed: [(100, 60.0), (400, 40.0 + seed)] for seed in range(3)}
    fast = {seed: [(100, 50.0 + seed), (200, 30.0 + seed), (400, 20.0)] for seed in range(3)}
    gain = speed_up(fast, slow)
    assert gain is not None
    assert list(gain.factors.values()) == pytest.approx([400 / 150] * 3)
    assert gain.at_least == frozenset()
    assert gain.comparison.verdict == "shown"
    back = speed_up(slow, fast)
    assert back is not None
    assert list(back.factors.values()) == [0, 0, 0]
    assert back.comparison.verdict == "not shown"
    at_once = speed_up({0: [(100, 1.0)]}, slow)
    assert at_once is not None
    assert (at_once.factors, at_once.at_least) == ({0: 4.0}, frozenset({0}))
    both = speed_up({0: [(100, 1.0)], 1: [(100, 1.0)]}, slow)
    assert both is not None
    assert (both.comparison.verdict, both.comparison.low) == ("not shown", None)  # two lower bounds alike
    assert speed_up({5: [(1, 1.0)]}, slow) is None
