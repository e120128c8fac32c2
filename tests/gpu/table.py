"""The JSON file and the table of a check of a device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.gpu.worker import Result

JSON, TABLE = "gpu_check.json", "gpu_check.md"


def write(folder: Path, facts: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write both files."""
    data = {**facts, "checks": [asdict(result) for result in results]}
    (folder / JSON).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(table(facts, results), encoding="utf-8")


def table(facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The Markdown page: facts, counts, and one row a check."""
    lines = ["# Check of a device", "", "| | |", "|---|---|"]
    for name, value in facts.items():
        shown = ", ".join(f"{key} {part}" for key, part in value.items()) if name == "versions" else value
        lines.append(f"| {name} | {_shown(shown)} |")
    lines += ["", summary(results), "", "| check | result | s | figures | reason |", "|---|---|---|---|---|"]
    for row in results:
        figures = "; ".join(f"{name} {_shown(value)}" for name, value in row.figures.items())
        reason = row.reason.replace("|", "\\|")
        lines.append(f"| {row.name} | {row.result} | {row.seconds:.1f} | {figures} | {reason} |")
    return "\n".join(lines) + "\n"


def summary(results: Sequence[Result]) -> str:
    """How many checks have which result."""
    counts = {name: sum(row.result == name for row in results) for name in ("passed", "failed", "not run")}
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "unknown" if value is None else str(value).replace("|", "\\|")
