"""What commands show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from openpae.runtime.terminal import output_mode, print_json, say, strict_json


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
