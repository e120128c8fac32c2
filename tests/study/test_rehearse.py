"""Estimated times: from finished stages, or from trial runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpae.storage.files import read_json
from openpae.study.plan import Plan
from openpae.study.rehearse import estimates
from openpae.study.settings import StudyData
from tests.study.conftest import QUICK, planned


def test_the_time_of_other_seeds_is_that_of_the_first(done: Plan, data: StudyData) -> None:
    more = planned(data, done.layout.out, changes=QUICK, rows=["none", "full"], seeds=[0, 1])
    known = estimates(more)
    assert set(known) == more.stages.keys() - done.stages.keys()
    seconds = {run.row: read_json(done.layout.record(run.tokenizer))["seconds"] for run in done.runs}
    for run in more.runs[2:]:
        assert known[run.tokenizer].seconds == pytest.approx(seconds[run.row])
        assert not known[run.tokenizer].rehearsed


def test_trial_runs_time_stages_that_were_never_done(data: StudyData, tmp_path: Path) -> None:
    plan = planned(data, tmp_path, changes=QUICK, rows=["none"], seeds=[0])
    known = estimates(plan, rehearse=True)
    assert known.keys() == plan.stages.keys()
    assert all(estimate.rehearsed and estimate.seconds >= 0 for estimate in known.values())
    assert not (tmp_path / "stages").exists()
