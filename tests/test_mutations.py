"""Every defect of mutations.yaml can be planted, and a test finds it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutations import PAGE, ROOT, Defect, copied, first_failure, read_defects

DEFECTS = read_defects()


def test_there_are_many_and_they_differ() -> None:
    assert len(DEFECTS) >= 60
    assert max(Counter(defect.label for defect in DEFECTS).values()) == 1


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.label)
def test_a_defect_can_be_planted(defect: Defect) -> None:
    """The package holds what the defect replaces; its tests and the words that choose them exist."""
    text = (ROOT / "src" / "openpae" / defect.file).read_text(encoding="utf-8")
    compile(defect.planted_in(text), defect.file, "exec")
    files = [part for part in defect.tests.split() if part.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)
    texts = [(ROOT / file.partition("::")[0]).read_text(encoding="utf-8") for file in files]
    words = re.findall(r"\w+", defect.tests.partition(" -k ")[2])
    for word in set(words) - {"and", "or", "not"}:
        assert any(word in text for text in texts), f"no test is called {word}"


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    with copied() as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.label)
def test_a_planted_defect_is_detected(defect: Defect, copy: Path) -> None:
    assert first_failure(defect, copy) is not None


def test_the_page_names_every_defect_and_tests_that_exist() -> None:
    rows = re.findall(r"^\| (.+) \| `([\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"), re.M)
    assert {label for label, _, _ in rows} == {defect.label for defect in DEFECTS}
    for _, file, name in rows:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {name}"
