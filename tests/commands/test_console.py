"""What the commands share."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from openpae.cli import COMMANDS, main


class Terminal(io.TextIOWrapper):
    """A stream of a terminal."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        self.seek(0)
        return self.read()


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return sys.stdout


@pytest.mark.parametrize("argv", [["pack", "--help"], ["pack", "a", "b", "--sise", "3"]], ids=" ".join)
def test_escape_codes_are_for_terminals_without_no_color(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_a_terminal(monkeypatch)
    with pytest.raises(SystemExit):
        main(argv)
    assert "\x1b[" in terminal.text()
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        main(argv)
    assert "--size" in terminal.text()
    assert "\x1b" not in terminal.text()


def test_a_log_of_errors_gets_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit):
        main(["pack", "a", "b", "--sise", "3"])
    assert "--size" in sys.stderr.getvalue()
    assert "\x1b" not in sys.stderr.getvalue()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_options_of_all_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "--quiet" in capsys.readouterr().out


def test_a_missing_device_is_named_by_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["sample", "tokenizer", "generator", str(tmp_path / "out"), "--device", "mps"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message == "pae: error: --device is mps, but torch sees no Apple GPU; use auto or cpu\n"
