"""What a command shows: results on standard output, notes and progress on standard error."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpae.runtime.escape import one_line


@dataclass
class _Mode:
    json: bool = False
    quiet: bool = False


_mode = _Mode()


@contextmanager
def output_mode(*, json: bool = False, quiet: bool = False) -> Iterator[None]:
    """Inside, commands show what the common options ask for.

    Args:
        quiet: no `note` and no `Progress`.
        json: `say` shows nothing, and what others print goes to standard error.
    """
    before = vars(_mode).copy()
    _mode.json, _mode.quiet = json, quiet
    try:
        with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
            yield
    finally:
        vars(_mode).update(before)


def say(text: object = "") -> None:
    """Print one line of the result, escaped: file names may hold any character."""
    if not _mode.json:
        print(one_line(text))


def note(text: object) -> None:
    """Print one line about the work on standard error, unless the command is quiet."""
    if not _mode.quiet:
        print(one_line(text), file=sys.stderr, flush=True)


class Progress:
    """Progress on standard error: a bar on a terminal, elsewhere one line every `EVERY` seconds.

    A context that gives a callable (done, total). Only rank 0 shows it, and no quiet command.

    Args:
        label: what is done.
        unit: what is counted.
        done: how many were done before.
        hidden: show nothing.
        clock: the time in seconds.
    """

    EVERY = 30.0

    def __init__(
        self,
        label: str,
        unit: str,
        *,
        done: int = 0,
        hidden: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from tqdm import tqdm

        from openpae.runtime import processes

        self.label, self.unit, self.initial, self.clock = label, unit, done, clock
        self.postfix = ""
        self.start = clock()
        self.due = self.start + self.EVERY
        shown = not hidden and not _mode.quiet and processes.is_rank0()
        self.lines = shown and not sys.stderr.isatty()
        self.bar = tqdm(
            desc=label,
            unit=unit,
            initial=done,
            disable=self.lines or not shown,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=1.0,
        )

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if self.lines and self.clock() >= self.due:
            self.due = self.clock() + self.EVERY
            line = self.bar.format_meter(
                done,
                total,
                self.clock() - self.start,
                prefix=self.label,
                unit=self.unit,
                initial=self.initial,
                postfix=self.postfix,
                bar_format="{desc}: {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}",
            )
            print(one_line(line), file=sys.stderr, flush=True)

    def add(self, postfix: str) -> None:
        """Show this text behind the numbers from now on."""
        self.postfix = postfix
        self.bar.set_postfix_str(postfix, refresh=False)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


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
