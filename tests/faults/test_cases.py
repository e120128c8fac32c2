"""Each row of the table of errors: the exit code, one line, never a traceback; and docs/errors.md says so."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.edited_cases import ROWS
from tests.faults.running import Case, Outcome, run_case

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def outcome_of(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Outcome]:
    """The outcome of a row; each runs once."""
    copy = tmp_path_factory.mktemp("cases") / "copy"
    return functools.cache(lambda case: run_case(case, ready, copy))


@pytest.mark.parametrize("case", ROWS, ids=lambda case: f"{case.group}: {case.given}")
def test_what_cannot_work_is_one_line(case: Case, outcome_of: Callable[[Case], Outcome]) -> None:
    outcome = outcome_of(case)
    assert "Traceback" not in outcome.everything, outcome.everything
    assert (outcome.code, bool(re.search(case.says, outcome.line))) == (case.code, True), outcome.everything
    assert "code was run" not in outcome.everything


def test_the_page_says_what_happens(outcome_of: Callable[[Case], Outcome]) -> None:
    """Otherwise run: python tools/make_errors.py"""
    page = make_errors().page({case: outcome_of(case) for case in ROWS})
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == page


def make_errors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_errors", ROOT / "tools" / "make_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
