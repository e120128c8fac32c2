"""Text from outside (names of files, messages of libraries) as it may stand on a terminal, page or chart."""

from __future__ import annotations

import re


def one_line(text: object) -> str:
    """The text in one line: what is not printable, such as a newline or an escape, is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def without_html(text: str) -> str:
    """The text as Markdown in which no raw HTML works."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def markdown(text: object) -> str:
    """The text in a cell of a Markdown table, without raw HTML."""
    return without_html(one_line(text)).replace("|", "/")


def spreadsheet(value: object) -> object:
    """The value in a cell of a CSV file: text that a spreadsheet would compute stays text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def chart(text: str) -> str:
    """The text as a label of matplotlib, which takes $ for mathematics and hides what begins with _."""
    plain = one_line(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
