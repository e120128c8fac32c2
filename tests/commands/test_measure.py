"""The commands that measure: their results for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpae.cli import main
from openpae.storage.files import read_json


def result(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The one object of a command with --json; NaN and Infinity are no JSON."""
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_evaluate_gives_its_record_with_reasons_for_what_is_undefined(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.array([96, 160], np.uint8).repeat(32 * 32 * 3).reshape(2, 32, 32, 3)
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    random = ["--extractor", "random", "--samples", tmp_path / "grey.npz"]
    with pytest.warns(UserWarning, match="only 2 samples"):
        printed = result(capsys, "evaluate", image_folder, *random, "--out", tmp_path / "record.json")
    record = read_json(tmp_path / "record.json")
    assert record["undefined"]
    for name, reason in record["undefined"].items():
        assert printed["metrics"][name] == {"value": None, "reason": reason}
    assert printed["metrics"]["frechet"] == record["metrics"]["frechet"]


def test_profile_gives_the_record_of_its_page(
    tokenizer_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--count", "10", "--lpc-count", "1", "--lpips", "random", "--extractor", "none"]
    out = tmp_path / "profile"
    printed = result(capsys, "profile", tokenizer_folder, "--images", image_folder, "--out", out, *small)
    (one,), (record,) = printed["tokenizers"], read_json(out / "profile.json")["tokenizers"]
    assert one["fingerprint"] == record["fingerprint"]
    assert one["metrics"].keys() == record["metrics"].keys() | record["undefined"].keys()
    assert one["metrics"]["psnr"] == record["metrics"]["psnr"]


def test_info_gives_its_facts(tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert result(capsys, "info", tokenizer_folder)["what"] == "a tokenizer"


def test_an_error_prints_no_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["info", tmp_path / "nothing"], ["pack", tmp_path, tmp_path / "out"]):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--json"])
        printed = capsys.readouterr()
        assert (stop.value.code, printed.out, len(printed.err.splitlines())) == (2, "", 1)
    assert "pae pack has no --json; these commands have it: plan, sample" in printed.err
