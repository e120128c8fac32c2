"""Plant the defects of mutations.yaml in a copy of the package and see that a test finds each.

    python tests/mutations.py           # all; writes the list and the tests that failed into docs/testing.md
    python tests/mutations.py WORD ...  # those that are described with one of these words

`pytest -m slow` runs them too (test_mutations.py).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- mutations -->\n", "<!-- end of mutations -->\n"
LIMIT = 900
"""Seconds after which a defect counts as detected: the tests hang."""


@dataclass(frozen=True, kw_only=True)
class Defect:
    """A change that breaks the package, as known from other code."""

    label: str
    """Description."""
    file: str
    """Below src/openpae."""
    old: str
    """The original text, at least once in the file."""
    new: str
    """The replacement of every occurrence."""
    tests: str
    """Arguments for pytest: the tests that should fail."""

    def planted_in(self, text: str) -> str:
        """The file's text with the defect.

        Raises:
            ValueError: the file has changed and no longer holds `old`.
        """
        if self.old not in text:
            raise ValueError(f"{self.file} does not hold {self.old!r}; update mutations.yaml")
        return text.replace(self.old, self.new)


def read_defects() -> list[Defect]:
    """All of mutations.yaml, with paths in place of their short names."""
    content = yaml.safe_load((Path(__file__).parent / "mutations.yaml").read_text(encoding="utf-8"))
    tests = {name: f"tests/{path}" for name, path in content["tests"].items()}
    return [
        Defect(
            **entry
            | {
                "file": content["files"][entry["file"]],
                "tests": re.sub(r"{([\w-]+)}", lambda match: tests[match[1]], entry["tests"]),
            }
        )
        for entry in content["defects"]
    ]


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the project to plant defects in."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "tests", "docs", "tools", "configs"):
            shutil.copytree(
                ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        yield copy


def first_failure(defect: Defect, copy: Path) -> str | None:
    """The first test that fails where the defect is, of those that should; None if they all pass.

    Raises:
        RuntimeError: pytest could not run them.
    """
    file = copy / "src" / "openpae" / defect.file
    original = file.read_text(encoding="utf-8")
    options = "-W error -q -x --tb=no -rfE -p no:cacheprovider"
    environment = os.environ | {
        "PYTHONPATH": str(copy / "src"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        file.write_text(defect.planted_in(original), encoding="utf-8")
        done = subprocess.run(
            f"{sys.executable} -m pytest {options} {defect.tests}",
            shell=True, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "(hangs)"
    finally:
        file.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest itself failed on {defect.label!r}:\n{done.stdout}\n{done.stderr}")
    names = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
    return names[0] if names else None


def table(finders: dict[str, str]) -> str:
    """The defects and the tests that failed, as Markdown."""
    rows = ["| defect | test that finds it |", "|---|---|"]
    for label, test in finders.items():
        name = re.sub(r"\[.*", "", test)
        rows.append(f"| {label} | `{name}` |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run all defects, or those whose words are given; write the page if all were run and detected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="only defects that are described with one of these")
    words = parser.parse_args().words
    chosen = [one for one in read_defects() if not words or any(word in one.label for word in words)]
    finders: dict[str, str] = {}
    missed: list[str] = []
    with copied() as copy:
        for defect in chosen:
            test = first_failure(defect, copy)
            print(f"{test or 'NO TEST':60} finds: {defect.label}", flush=True)
            if test is None:
                missed.append(defect.label)
            else:
                finders[defect.label] = test
    if missed:
        sys.exit(f"{len(missed)} of {len(chosen)} were not detected: {'; '.join(missed)}")
    if not words:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(before + BEGIN + table(finders) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
