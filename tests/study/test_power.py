"""Power of a study: visible differences against a simulation, spreads, the table, its errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind

from openpae import config as configs
from openpae.study.power import power_table, spreads
from openpae.study.settings import Study
from openpae.study.table import Result, read_table, write_table
from openpae.study.verdicts import seeds_for, visible_difference


def result(row: str, seed: int, value: float, metric: str = "gfid") -> Result:
    return Result(
        study="table2a-small", row=row, seed=seed, metric=metric, step=240, value=value, stderr=None,
        seconds=1.5, commit="0.1.0 abc",
    )  # fmt: skip


@pytest.fixture(scope="module")
def study() -> Study:
    return configs.load(Study, "study/table2a-small")


PILOT = [
    *(result("none", seed, value) for seed, value in enumerate((10.0, 12.0, 14.0))),
    *(result("full", seed, value) for seed, value in enumerate((5.0, 6.0, 10.0))),
]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("seeds", [3, 6])
def test_a_visible_difference_is_shown_in_four_of_five_studies(seeds: int, paired: bool) -> None:
    draw = np.random.default_rng(0)
    a = draw.normal(visible_difference(2.0, seeds, paired=paired), 2.0, (20_000, seeds))
    if paired:
        p = ttest_1samp(a, 0.0, axis=1).pvalue
    else:
        p = ttest_ind(a, draw.normal(0.0, 2.0, (20_000, seeds)), axis=1).pvalue
    # The standard error of a share of 20,000 is 0.003.
    assert np.mean((p < 0.05) & (a.mean(axis=1) > 0)) == pytest.approx(0.8, abs=0.012)


def test_more_seeds_see_less_and_seeds_for_is_the_inverse() -> None:
    sizes = [visible_difference(1.0, n) for n in range(2, 20)]
    assert sizes == sorted(sizes, reverse=True)
    assert visible_difference(3.0, 5) == pytest.approx(3 * visible_difference(1.0, 5))
    for n in (2, 5, 11):
        for paired in (False, True):
            size = visible_difference(1.0, n, paired=paired)
            assert seeds_for(1.0001 * size, 1.0, paired=paired) == n
            assert seeds_for(-0.9999 * size, 1.0, paired=paired) == n + 1
    assert seeds_for(1e-3, 1.0) is None
    assert seeds_for(100.0, 1.0, least=4) == 4


def test_spreads_are_pooled_within_rows_and_within_pairs(study: Study) -> None:
    plain, paired = spreads(study, PILOT, "gfid")
    assert plain == pytest.approx(np.sqrt((8 + 14) / 4))
    assert paired == pytest.approx(np.std([5, 6, 4], ddof=1))
    one_more = [*PILOT, result("SSR", 0, 3.0), result("SSR", 1, 5.0)]
    plain, paired = spreads(study, one_more, "gfid")
    assert plain == pytest.approx(np.sqrt((8 + 14 + 2) / 5))
    pairs = [[5, 6, 4], [7, 7], [2, 1]]
    squares = sum(((np.array(pair) - np.mean(pair)) ** 2).sum() for pair in pairs)
    assert paired == pytest.approx(np.sqrt(squares / 4))
    assert spreads(study, [result("none", 0, 1.0), result("full", 1, 2.0)], "gfid") == (None, None)


def test_the_table_has_the_metrics_and_the_claims_of_the_pilot(study: Study) -> None:
    header, rows = power_table(study, PILOT, seeds=(3, 5))
    assert header[2:4] == ["visible with 3 seeds", "visible with 5 seeds"]
    assert [row[0] for row in rows] == [
        "gfid, two samples", "gfid, paired", "gfid: full better than none",
    ]  # fmt: skip
    assert float(rows[0][2]) == pytest.approx(visible_difference(5.5**0.5, 3), rel=1e-2)
    assert float(rows[1][3]) == pytest.approx(visible_difference(1.0, 5, paired=True), rel=1e-2)
    # Lower is better: full gains 5 in gFD.
    expected = seeds_for(5.0, 5.5**0.5), seeds_for(5.0, 1.0, paired=True)
    assert rows[2][-1] == "+5: {} seeds, paired {}".format(*expected)


def test_a_pilot_of_one_seed_is_refused(study: Study) -> None:
    alone = [dataclasses.replace(one) for one in PILOT if one.seed == 0]
    with pytest.raises(ValueError, match="no row of table2a-small has two seeds in these results"):
        power_table(study, alone)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = [*PILOT, dataclasses.replace(PILOT[0], step=None, stderr=0.25, metric="ssc")]
    write_table(results, tmp_path / "results.csv")
    assert read_table(tmp_path / "results.csv") == results
    with pytest.raises(FileNotFoundError, match=r"pae study writes results\.csv into its folder"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"other.csv is no results.csv of pae study: its columns must be study"
    ):
        read_table(tmp_path / "other.csv")
