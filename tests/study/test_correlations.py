"""Rank correlations: which tokenizers count, and their bootstrap intervals, compared with SciPy."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.stats import rankdata

from openpae.study.correlations import Point, _rank_correlations, correlations, points


def plan_of(tmp_path: Path, settings: list[str], **runs: Any) -> Any:
    """One run for each setting of the evaluation of samples: SSC i, distance 10 + i."""
    stages: dict[str, Any] = {}
    made = []
    for number, setting in enumerate(settings):
        stages[f"judge-{number}"] = SimpleNamespace(settings=setting)
        values = {"judge": {"gfid": 10 + number}, "measure": {"ssc": number}}
        for kind, metrics in values.items():
            record = {"metrics": {name: {"value": value, "stderr": None} for name, value in metrics.items()}}
            (tmp_path / f"{kind}-{number}").write_text(json.dumps(record))
        made.append(
            SimpleNamespace(
                study="s", row=f"row {number}", evaluations={5: "earlier", 10: f"judge-{number}"},
                measure=f"measure-{number}", tokenizer=f"tokenizer-{number}",
            )
        )  # fmt: skip
    return SimpleNamespace(
        runs=made, stages=stages, record=lambda name: json.loads((tmp_path / name).read_text())
    )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (["other", "usual", "usual"], [1, 2]),
        (["usual", "other", "usual"], [0, 2]),
        (["usual", "usual", "other"], [0, 1]),
    ],
)
def test_the_most_common_settings_of_the_samples_count(
    tmp_path: Path, settings: list[str], kept: list[int]
) -> None:
    tokenizers = points(plan_of(tmp_path, settings), ["s"])
    assert [point.metrics["ssc"] for point in tokenizers] == kept
    assert [point.quality for point in tokenizers] == [-(10 + number) for number in kept]
    assert [point.group for point in tokenizers] == [f"s/row {number}" for number in kept]


def some_points() -> list[Point]:
    """Six settings of one to three seeds, whose members differ."""
    draws = np.random.default_rng(4)
    tokenizers = []
    for group, seeds in enumerate((1, 3, 2, 3, 1, 2)):
        for _ in range(seeds):
            quality = group + 2 * draws.normal()
            metrics = {"ssc": group + 2 * draws.normal(), "lpc": draws.normal() - group}
            tokenizers.append(Point(group=f"g{group}", metrics=metrics, quality=quality))
    return tokenizers


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def test_the_interval_of_a_correlation_resamples_full_settings() -> None:
    """Percentiles 2.5 and 97.5 of 400 draws of settings with all their seeds."""
    tokenizers = some_points()
    groups = sorted({point.group for point in tokenizers})
    quality = np.array([point.quality for point in tokenizers])
    sides = {
        "ssc": np.array([p.metrics["ssc"] for p in tokenizers]),
        "lpc": np.array([-p.metrics["lpc"] for p in tokenizers]),
    }
    generator = np.random.default_rng(3)
    drawn: dict[str, list[float]] = {"ssc": [], "lpc": []}
    for _ in range(400):
        chosen = [groups[i] for i in generator.integers(len(groups), size=len(groups))]
        rows = [row for group in chosen for row, point in enumerate(tokenizers) if point.group == group]
        for name, x in sides.items():
            drawn[name].append(spearman(x[rows], quality[rows]))
    ssc, lpc = correlations(tokenizers, ["ssc", "lpc"], against=["lpc"], draws=400, seed=3)
    for one, name in ((ssc, "ssc"), (lpc, "lpc")):
        assert one.rho == pytest.approx(spearman(sides[name], quality))
        assert (one.low, one.high) == pytest.approx(tuple(np.percentile(drawn[name], [2.5, 97.5])))
    gain = np.array(drawn["ssc"]) - np.array(drawn["lpc"])
    expected = (ssc.rho - lpc.rho, *np.percentile(gain, [2.5, 97.5]))
    assert ssc.over["lpc"] == pytest.approx(expected)


def test_rank_correlations_are_scipys() -> None:
    generator = np.random.default_rng(0)
    columns = generator.integers(0, 5, (20, 4)).astype(float)  # with ties
    columns[:, 1] = 1.0
    with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):
        expected = [stats.spearmanr(columns[:, k], columns[:, -1]).statistic for k in range(3)]
    np.testing.assert_allclose(_rank_correlations(columns), expected, atol=1e-12)


def test_correlations_turn_both_sides_so_that_larger_is_better() -> None:
    """Lower LPC and rFD are better: their sign changes. PSNR falls with the quality here."""
    tokenizers = [
        Point(
            group=f"row {i}", metrics={"lpc": float(-i), "rfid": float(10 - i), "psnr": float(-i)}, quality=i
        )
        for i in range(8)
        for _ in range(3)
    ]
    table = {
        one.metric: one for one in correlations(tokenizers, ["lpc", "psnr", "ssc"], against=["psnr", "rfid"])
    }
    assert table.keys() == {"lpc", "psnr"}
    assert (table["lpc"].rho, table["psnr"].rho) == pytest.approx((1, -1))
    assert (table["lpc"].low, table["lpc"].high) == pytest.approx((1, 1))
    assert table["lpc"].over["psnr"] == pytest.approx((2, 2, 2))
    assert table["lpc"].over["rfid"] == pytest.approx((0, 0, 0))
    assert correlations(tokenizers[:12], ["lpc"]) == []  # four settings


def test_the_interval_of_a_correlation_grows_where_seeds_repeat_each_other() -> None:
    """Thirty tokenizers of six settings hold no more information than six settings."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=30)
    y = x + generator.normal(size=30)
    apart = [Point(group=str(i), metrics={"ssc": x[i]}, quality=y[i]) for i in range(30)]
    together = [Point(group=str(i % 6), metrics={"ssc": x[i % 6]}, quality=y[i % 6]) for i in range(30)]
    wide, narrow = (correlations(p, ["ssc"])[0] for p in (together, apart))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
