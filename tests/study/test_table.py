"""The table of results: one row per number, read by seed and step."""

from __future__ import annotations

import dataclasses
import math

from openpae.storage.files import read_json
from openpae.study.correlations import points
from openpae.study.plan import Plan
from openpae.study.table import collect, curves, finals
from tests.study.conftest import read


def test_the_table_is_tidy(done: Plan) -> None:
    rows = read(done)
    assert list(rows[0]) == ["study", "row", "seed", "metric", "step", "value", "stderr", "seconds", "commit"]
    measured = {row["metric"] for row in rows if row["row"] == "full" and not row["step"]}
    assert {"ssc", "lpc", "gsq", "erank", "psnr", "ssim", "lpips", "rfid", "ifid"} <= measured
    sampled = {(row["metric"], row["step"]) for row in rows if row["row"] == "full" and row["step"]}
    assert {("gfid", "2"), ("gfid", "4"), ("gfid_own", "4"), ("gfid_floor", "4")} <= sampled
    record = read_json(done.layout.record(next(run.evaluations[4] for run in done.runs if run.row == "none")))
    (line,) = (r for r in rows if (r["row"], r["metric"], r["step"]) == ("none", "gfid", "4"))
    assert float(line["value"]) == record["metrics"]["gfid"]["value"]
    assert all(math.isfinite(float(row["value"])) and float(row["seconds"]) > 0 for row in rows)


def test_results_are_read_by_their_last_step(done: Plan) -> None:
    results = collect(done, ["tiny"])
    (curve,) = curves(results, "tiny", "full", "gfid").values()
    assert [step for step, _ in curve] == [2, 4]
    assert finals(results, "tiny", "full", "gfid") == {0: curve[-1][1]}
    assert [point.quality for point in points(done, ["tiny"])] == [
        -finals(results, "tiny", row, "gfid")[0] for row in ("none", "full")
    ]
    none, full = done.runs
    again = dataclasses.replace(full, row="another generator", evaluations=none.evaluations)
    assert len(points(dataclasses.replace(done, runs=(none, full, again)), ["tiny"])) == 2  # tokenizers
