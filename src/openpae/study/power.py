"""Power of a study: which differences its claims can show, from the seeds of a pilot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from openpae.study.settings import HIGHER_IS_BETTER, Study
from openpae.study.table import Result, finals
from openpae.study.verdicts import seeds_for, visible_difference


def spreads(study: Study, results: Sequence[Result], metric: str) -> tuple[float | None, float | None]:
    """Standard deviation over seeds of a metric: within a row, and of differences of two rows per seed.

    Both are pooled over all rows, or pairs of rows, that have two seeds (in common). None without such rows.
    """
    rows = [finals(results, study.name, row.name, metric) for row in study.rows]
    plain = [list(values.values()) for values in rows if len(values) > 1]
    pairs = []
    for a, b in itertools.combinations(rows, 2):
        common = sorted(a.keys() & b.keys())
        if len(common) > 1:
            pairs.append([a[seed] - b[seed] for seed in common])
    return _pooled(plain), _pooled(pairs)


def _pooled(groups: Sequence[Sequence[float]]) -> float | None:
    """Root of the variance within the groups, pooled over them by their degrees of freedom."""
    if not groups:
        return None
    squares = sum(float(np.square(np.array(group) - np.mean(group)).sum()) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


def power_table(
    study: Study, results: Sequence[Result], seeds: Sequence[int] = (3, 5, 8)
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: for each metric of the claims the visible differences, then each claim.

    Args:
        study: the study to plan.
        results: results of some of its rows with at least two seeds each.
        seeds: numbers of seeds a row.

    Raises:
        ValueError: no row of the study has two seeds.
    """
    rows = []
    for metric in dict.fromkeys(claim.metric for claim in study.claims):
        for paired, spread in zip((False, True), spreads(study, results, metric), strict=True):
            if spread is None:
                continue
            visible = [visible_difference(spread, n, paired=paired) for n in seeds]
            kind = "paired" if paired else "two samples"
            rows.append([f"{metric}, {kind}", f"{spread:.3g}", *(f"{value:.3g}" for value in visible), ""])
    if not rows:
        raise ValueError(
            f"no row of {study.name} has two seeds in these results; run two rows with two seeds"
        )
    for claim in study.claims:
        better, worse = (
            finals(results, study.name, name, claim.metric) for name in (claim.better, claim.worse)
        )
        if not better or not worse:
            continue
        sign = 1 if claim.metric in HIGHER_IS_BETTER else -1
        gain = sign * float(np.mean(list(better.values())) - np.mean(list(worse.values())))
        needed = [
            "-" if spread is None else str(seeds_for(gain, spread, paired=paired) or "more than 100")
            for paired, spread in zip((False, True), spreads(study, results, claim.metric), strict=True)
        ]
        text = f"{gain:+.3g}: {needed[0]} seeds, paired {needed[1]}"
        rows.append(
            [f"{claim.metric}: {claim.better} better than {claim.worse}", *[""] * (len(seeds) + 1), text]
        )
    header = ["metric", "std over seeds", *(f"visible with {n} seeds" for n in seeds), "gain in the pilot"]
    return header, rows
