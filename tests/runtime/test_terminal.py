"""What commands show."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest

from openpae.runtime.terminal import Progress, note, output_mode, print_json, say, strict_json


def refuse(constant: str) -> None:
    pytest.fail(f"{constant} is no JSON")


def test_an_object_is_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"psnr": {"value": math.inf, "stderr": None, "n": 1}, "ssim": {"value": 0.5, "n": 1}}
    print_json(
        {
            "metrics": metrics,
            "undefined": {"kid": "it needs two samples"},
            "file": Path("a"),
            "size": (4, math.nan),
        }
    )
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed == {
        "metrics": {
            "psnr": {"value": None, "stderr": None, "n": 1, "reason": "the value is inf"},
            "ssim": {"value": 0.5, "n": 1},
            "kid": {"value": None, "reason": "it needs two samples"},
        },
        "undefined": {"kid": "it needs two samples"},
        "file": "a",
        "size": [4, None],
    }


def test_plain_data_stay_what_they_are() -> None:
    data = {"a": [1, 0.5, "x", None, True], "b": {"undefined": {"x": "y"}}}
    assert strict_json(data) == data


def test_under_json_results_are_silent_and_other_prints_go_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with output_mode(json=True):
        say("a result")
        print("of a library")
    say("later\nresult")
    assert capsys.readouterr() == ("later\\nresult\n", "of a library\n")


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_off_a_terminal_progress_is_a_line_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    times = [0.0]

    def clock() -> float:
        return times[-1]

    with Progress("packing", "img", clock=clock) as progress:
        for second in range(0, 100, 10):
            times.append(float(second))
            progress.add(f"loss {second}")
            progress(second, 200)
    assert capsys.readouterr().err.splitlines() == [
        "packing: 30 of 200,  1.00img/s, 02:50 left, loss 30",
        "packing: 60 of 200,  1.00img/s, 02:20 left, loss 60",
        "packing: 90 of 200,  1.00img/s, 01:50 left, loss 90",
    ]


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("packing", "img", done=1) as progress:
        progress(3, 4)
    assert "packing:  75%" in sys.stderr.getvalue()


def test_a_quiet_command_shows_neither_progress_nor_notes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    for hidden in (True, False):
        with output_mode(quiet=not hidden), Progress("packing", "img", hidden=hidden) as progress:
            progress(1, 2)
            if not hidden:
                note("downloading")
            say("the result")
    assert capsys.readouterr() == ("the result\n" * 2, "")
    note("two\nlines")
    assert capsys.readouterr().err == "two\\nlines\n"
