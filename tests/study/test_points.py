"""Which tokenizers a correlation is over, and how wide its interval is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata, t

from openpae.study.correlations import Point, correlations, points
from openpae.study.verdicts import compare, verdict_of


def plan_of(tmp_path: Path, settings: list[str], **cells: Any) -> Any:
    """One cell for each of these settings of its samples' evaluation: SSC i, distance 10 + i."""
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
                study="s", row=f"row {number}", judges={5: "earlier", 10: f"judge-{number}"},
                measure=f"measure-{number}", tokenizer=f"tokenizer-{number}",
            )
        )  # fmt: skip
    return SimpleNamespace(
        cells=made, stages=stages, record=lambda name: json.loads((tmp_path / name).read_text())
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
    found = points(plan_of(tmp_path, settings), ["s"])
    assert [point.metrics["ssc"] for point in found] == kept
    assert [point.quality for point in found] == [-(10 + number) for number in kept]
    assert [point.group for point in found] == [f"s/row {number}" for number in kept]


def some_points() -> list[Point]:
    """Six settings of one to three seeds, whose members differ."""
    draws = np.random.default_rng(4)
    found = []
    for group, seeds in enumerate((1, 3, 2, 3, 1, 2)):
        for _ in range(seeds):
            quality = group + 2 * draws.normal()
            metrics = {"ssc": group + 2 * draws.normal(), "lpc": draws.normal() - group}
            found.append(Point(group=f"g{group}", metrics=metrics, quality=quality))
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def test_the_interval_of_a_correlation_is_that_of_whole_settings_drawn() -> None:
    """Percentiles 2.5 and 97.5 of 400 draws of settings with all their seeds, the same generator."""
    found = some_points()
    groups = sorted({point.group for point in found})
    quality = np.array([point.quality for point in found])
    sides = {
        "ssc": np.array([p.metrics["ssc"] for p in found]),
        "lpc": np.array([-p.metrics["lpc"] for p in found]),
    }
    generator = np.random.default_rng(3)
    drawn: dict[str, list[float]] = {"ssc": [], "lpc": []}
    for _ in range(400):
        chosen = [groups[i] for i in generator.integers(len(groups), size=len(groups))]
        rows = [row for group in chosen for row, point in enumerate(found) if point.group == group]
        for name, x in sides.items():
            drawn[name].append(spearman(x[rows], quality[rows]))
    ssc, lpc = correlations(found, ["ssc", "lpc"], against=["lpc"], draws=400, seed=3)
    for one, name in ((ssc, "ssc"), (lpc, "lpc")):
        assert one.rho == pytest.approx(spearman(sides[name], quality))
        assert (one.low, one.high) == pytest.approx(tuple(np.percentile(drawn[name], [2.5, 97.5])))
    gain = np.array(drawn["ssc"]) - np.array(drawn["lpc"])
    expected = (ssc.rho - lpc.rho, *np.percentile(gain, [2.5, 97.5]))
    assert ssc.over["lpc"] == pytest.approx(expected)


def test_intervals_of_means_are_as_wide_as_students_t_says() -> None:
    """Of differences, one per seed, and of two rows (Welch)."""
    gains = [0.3, 1.1, 0.4, 0.9]
    mean, half = np.mean(gains), t.ppf(0.975, 3) * np.std(gains, ddof=1) / 2
    found = compare(dict(enumerate(gains)), dict.fromkeys(range(4), 0.0), higher=True, paired=True)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    a, b = {0: 3.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 1.5}
    parts = [np.var([*row.values()], ddof=1) / len(row) for row in (a, b)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    half = t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    gain = np.mean([*a.values()]) - np.mean([*b.values()])
    two = compare(a, b, higher=True)
    assert (two.gain, two.low, two.high) == pytest.approx((gain, gain - half, gain + half))
    assert verdict_of(two.low or 0, two.high or 0) == two.verdict
