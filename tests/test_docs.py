"""The pages build into a site without a warning, hold every public name, and keep the rules of the text."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import openpae

ROOT = Path(__file__).parent.parent
CARD = ROOT / "pretrained" / "openmoji" / "README.md"
PAGES = sorted([CARD, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OF_STUDIES = {ROOT / "docs" / "study" / name for name in ("results.md", "fig1-long.md")}
"""What `pae study` wrote: tables below each study's own text."""
NUMBER = re.compile(r"(?<![\w.:/-])[+-]?\d[\d,]*(?:\.\d+)*(?:e-?\d+)?(?: ± [\d.]+)?(?![\w:/])")
NAMED = re.compile(
    r"`[^`]*`|\]\([^)]*\)|arXiv:\S+|\d{4}-\d\d-\d\d"
    r"|(?:Tables?|Figs?\.|Eq\.|Sec\.|Theorem|version|steps?|stage|seed) \d[\w.]*"
    r"(?:\(\w\))?(?:(?:,| and| to) \d+)*"
)
"""What holds digits and is no number: code, links, dates, and what is called by its number."""


def paragraphs(text: str) -> Iterator[str]:
    """The prose of a page, an item or a paragraph at a time: no code, tables, headings or config fields."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=[|#])", text):
        if block.strip() and not re.match(r"\n*(?:[|#]|    |<!--|:::|- \w+: )", block):
            yield " ".join(re.sub(r"^\s*(?:[-*]|\d+\.) ", "", block.strip("\n")).split())


def numbers(prose: str) -> list[str]:
    return NUMBER.findall(NAMED.sub("", prose))


def prose_lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if not line.startswith("|"))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_public_name_stands_in_the_reference(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    headings = set(re.findall(r'<h\d id="(?:openpae\.)?(\w+)"', page))
    assert {one for one in openpae.__all__ if one not in headings and one.lower() not in headings} == set()


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]*"', page.read_text("utf-8")
        )
        assert found == [], page.name


def test_the_search_finds_every_page(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'"{page.stem}.html' in index, page.name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_line_is_longer_than_110_columns(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [line for line in prose_lines(text) if len(line) > 110] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OF_STUDIES], ids=name)
def test_no_paragraph_holds_more_than_three_numbers(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [(numbers(one), one) for one in paragraphs(text) if len(numbers(one)) > 3] == []


def test_numbers_are_counted_as_a_reader_does() -> None:
    text = "At step 200 of Table 2(a) gFD is -7.7 ± 0.9, in 32x32x16 `x 5` 1,000 of 2 %."
    assert numbers(text) == ["-7.7 ± 0.9", "1,000", "2"]
    assert list(paragraphs("a\nb\n\n- c\n- d\n\n| 1 | 2 |\n\n```\n3\n```\n# h")) == ["a b", "c", "d"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_plain_words(page: Path) -> None:
    """The glossary's words; names of config fields stand in code."""
    prose = re.sub(r"`[^`]*`|```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    assert re.findall(r"(?i)\b(?:can not|judge[sd]?|tells?|told)\b", prose) == []
