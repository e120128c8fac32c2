"""Escape file names and messages of libraries for terminals, Markdown, CSV and charts."""

from __future__ import annotations

import re


def one_line(text: object) -> str:
    """The text with non-printable characters, such as newlines, as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def without_html(text: str) -> str:
    """The text with raw HTML disabled, for Markdown."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def markdown(text: object) -> str:
    """The text for a cell of a Markdown table: one line, no raw HTML, link, image or column separator."""
    return without_html(one_line(text)).replace("|", "/").replace("](", r"]\(")


def code(text: object) -> str:
    """The text as Markdown code in one line."""
    plain = one_line(text).replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def spreadsheet(value: object) -> object:
    """The value for a CSV cell. Text that a spreadsheet would take for a formula gets a leading quote."""
    formula = isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{value}" if formula else value


def chart(text: str) -> str:
    """The text as a matplotlib label, where $ starts mathematics and a leading _ hides the label."""
    plain = one_line(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
