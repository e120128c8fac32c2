"""Text from outside cannot control a terminal, a page, a spreadsheet or a chart."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpae.runtime.escape import chart, code, markdown, one_line, spreadsheet, without_html

CONTROLS = st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Cs"]), min_size=1)


@given(CONTROLS, st.text())
def test_control_characters_of_names_are_written_out(controls: str, name: str) -> None:
    line = one_line(name + controls + name)
    assert line.isprintable()
    assert "\\" in line


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"])))
def test_printable_names_stay_unchanged(name: str) -> None:
    assert one_line(name) == name


def test_escapes_name_the_character() -> None:
    assert one_line("a\n\x1b[2J\u202eb\ud800") == r"a\n\x1b[2J\u202eb\ud800"
    assert one_line(ValueError("a\tb")) == r"a\tb"


@given(st.text())
def test_markdown_is_one_cell_without_tags(text: str) -> None:
    cell = markdown(text)
    assert cell.isprintable()
    assert "|" not in cell
    assert not re.search(r"<[A-Za-z/!?]", cell)
    assert "](" not in cell


@given(st.text())
def test_markdown_code_is_one_span(text: str) -> None:
    span = code(text)
    assert span.isprintable()
    assert span.count("`") == 2
    assert "|" not in span


@pytest.mark.parametrize("text", ["[free](https://x.y)", "![seen](https://x.y/z.png)", "[a]<b>(c)"])
def test_a_name_makes_no_link_and_no_picture(text: str) -> None:
    assert not re.search(r"\]\(|<\w", markdown(text))


def test_comparisons_are_no_tags() -> None:
    assert without_html("a < 3 <b>") == "a < 3 &lt;b>"
    assert html.unescape(without_html("<!-- x -->")) == "<!-- x -->"


def test_a_spreadsheet_computes_no_text() -> None:
    for start in "=+-@":
        for space in ("", " ", "\t", "\r\n"):
            assert spreadsheet(f"{space}{start}1") == f"'{space}{start}1"
    assert spreadsheet("a=1") == "a=1"
    assert spreadsheet(-1.5) == -1.5


def test_a_chart_shows_every_label_as_text() -> None:
    assert chart("$x$_1") == r"\$x\$_1"
    assert chart("_hidden") == " _hidden"
