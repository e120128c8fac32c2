"""The completion of the whole command, as the shell asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from openpae.cli import COMMANDS, main
from openpae.commands.completion import SHELLS

ASK = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tyro_pae; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("completion") / "pae.bash"
    done = subprocess.run(
        [sys.executable, "-m", "openpae", "--print-completion", "bash"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    file.write_text(done.stdout)
    return str(file)


def completed(script: str, *words: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", ASK, script, "pae", *words], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_commands_and_options_are_completed(script: str) -> None:
    assert set(completed(script, "")) - {"-h", "--help"} == set(COMMANDS)
    assert completed(script, "rec") == ["reconstruct"]
    assert completed(script, "sample", "a", "b", "c", "--cou") == ["--count"]
    assert completed(script, "bench", "generator", "--precision", "b") == ["bf16"]
    assert completed(script, "train-generator", "generator/tiny", "x", "--loop.ste") == ["--loop.steps"]
    assert completed(script, "plan", "generator/tiny", "--car") == ["--card"]


def test_the_options_of_all_commands_are_completed(script: str) -> None:
    assert completed(script, "pack", "--qui") == completed(script, "train-refiner", "--qui") == ["--quiet"]
    assert completed(script, "info", "--js") == ["--json"]
    assert completed(script, "pack", "--js") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)


@pytest.mark.parametrize("shell", [[], ["tcsh"]])
def test_another_shell_is_an_error(shell: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", *shell])
    assert stop.value.code == 2
    assert "--print-completion must be one of bash, zsh, fish, got" in capsys.readouterr().err
