"""The tables of a study as Markdown, for papers, READMEs and issues."""

from __future__ import annotations

from collections.abc import Sequence

from openpae.runtime.escape import markdown
from openpae.study.page import numbers, ranks, speed, verdicts
from openpae.study.plan import Plan
from openpae.study.settings import Study
from openpae.study.table import Result, cost, points


def study_text(plan: Plan, studies: Sequence[Study], results: Sequence[Result], command: str) -> str:
    """What `study_page` shows, without its pictures.

    Args:
        plan: what was planned; its records are read.
        studies: those to show.
        results: their numbers, from `collect`.
        command: how it was called.
    """
    parts = []
    for study in studies:
        header, rows = numbers(study, results)
        parts += [f"## {markdown(study.title)}", markdown(study.text)]
        parts.append(_table(header, rows) if rows else "Nothing of it is done yet.")
        for header, rows in (verdicts(study, results), speed(study, results)):
            parts.append(_table(header, rows) if rows else "")
    names = [study.name for study in studies]
    tables = [ranks(points(plan, names, quality), quality) for quality in ("gfid", "gfid_own")]
    if any(rows for _, rows in tables):
        parts.append("## Rank correlations with the quality of samples")
        parts += [_table(header, rows) for header, rows in tables if rows]
    seconds, code = cost(plan, names)
    parts += [
        "## How",
        f"`{markdown(command)}`, code {', '.join(code) or '-'}, {seconds / 3600:.2f} h for the rows.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(markdown, line))} |" for line in lines)
