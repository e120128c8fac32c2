"""Pairs by path and by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import openpae
from openpae.sampling.pipeline import Pipeline
from openpae.storage.pairs import PACKAGED, find_pair, list_models


def test_the_package_has_its_pair() -> None:
    assert list_models() == openpae.list_models()
    assert find_pair("openmoji") == PACKAGED / "openmoji"
    generator = Pipeline.from_pretrained("openmoji").generator
    assert generator.made_with == openpae.identity_of(PACKAGED / "openmoji" / "tokenizer").fingerprint


def test_a_folder_comes_before_a_name_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openmoji").mkdir()
    assert find_pair("openmoji") is None
    for part in ("tokenizer", "generator"):
        (tmp_path / "openmoji" / part).mkdir()
    assert find_pair("openmoji") == Path("openmoji")


def test_other_names_are_no_pair() -> None:
    assert [find_pair(name) for name in ("owner/name", "openmojis", "", "..", "openmoji/tokenizer")] == [
        None
    ] * 5
