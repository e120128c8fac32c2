"""`pae env`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from pathlib import Path

import pytest
import torch

from openpae.cli import main
from openpae.commands.env import environment


def test_the_facts_are_those_of_this_machine() -> None:
    facts = environment()
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["torch threads"] == torch.get_num_threads()
    assert facts["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert facts["free disk here in GiB"] > 0
    assert len(facts["GPUs"]) == torch.cuda.device_count()


def test_text_and_json_say_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def without_scipy(name: str) -> str:
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_scipy)
    main(["env"])
    lines = dict(re.findall(r"^ *(\S.*?)  +(\S.*)$", capsys.readouterr().out, re.M))
    main(["env", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert lines["torch threads"] == str(printed["torch threads"])
    assert lines["scipy"] == "not installed"
    assert printed["packages"]["scipy"] is None
    assert lines["numpy"] == printed["packages"]["numpy"]


def test_it_names_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["env"])
    printed = capsys.readouterr().out
    assert str(tmp_path) not in printed
    assert str(Path.home()) not in printed
