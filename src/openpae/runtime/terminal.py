"""What a command shows: results on standard output, notes and progress on standard error."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpae.runtime.escape import one_line


@dataclass
class _Mode:
    json: bool = False


_mode = _Mode()


@contextmanager
def output_mode(*, json: bool = False) -> Iterator[None]:
    """Inside, commands show what the common options ask for.

    Args:
        json: `say` shows nothing, and what others print goes to standard error.
    """
    before = vars(_mode).copy()
    _mode.json = json
    try:
        with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
            yield
    finally:
        vars(_mode).update(before)


def say(text: object = "") -> None:
    """Print one line of the result, escaped: file names may hold any character."""
    if not _mode.json:
        print(one_line(text))


def print_json(result: Mapping[str, Any]) -> None:
    """Print a result as one object of strict JSON, see `strict_json`."""
    print(json.dumps(strict_json(result), indent=1, allow_nan=False))


def strict_json(value: Any) -> Any:
    """The value as plain data without NaN and infinity, which JSON lacks: they become null.

    A metric without a value is null with its `reason`: one that is not finite, and those that stand in
    `undefined` beside `metrics`.
    """
    if isinstance(value, Mapping):
        plain = {str(key): strict_json(item) for key, item in value.items()}
        if isinstance(number := value.get("value"), float) and not math.isfinite(number):
            plain["reason"] = f"the value is {number}"
        if isinstance(metrics := plain.get("metrics"), dict):
            reasons = plain.get("undefined") or {}
            metrics |= {name: {"value": None, "reason": reason} for name, reason in reasons.items()}
        return plain
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
