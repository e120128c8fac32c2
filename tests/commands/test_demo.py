"""`pae demo`: its arguments, and the message without Gradio."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from openpae.cli import main


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["pair", "--tokenizer", "a"], "takes a PAIR or --tokenizer FOLDER, not both"),
        (["--generator", "a"], "--generator needs --tokenizer"),
        (["--port", "0"], "--port must lie in [1, 65535], got 0"),
    ],
    ids=["both", "generator", "port"],
)
def test_arguments_that_do_not_fit(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *arguments])
    assert text in capsys.readouterr().err


def test_without_gradio_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "openpae.demo.page", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", str(tmp_path)])
    line = "pae: error: pae demo needs gradio; install it with pip install 'openpae[demo]'\n"
    assert capsys.readouterr().err == line
