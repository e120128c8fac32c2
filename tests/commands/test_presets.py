"""`pae presets`."""

from __future__ import annotations

import pytest

from openpae import config as configs
from openpae.cli import main


def test_every_preset_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == configs.preset_names()
    tiny = next(line for line in lines if line.startswith("generator/tiny "))
    assert tiny.endswith("  The smallest generator, for the latents of tokenizer/tiny: seconds on a CPU")


def test_a_preset_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["presets", "tokenizer/tiny"])
    assert capsys.readouterr().out == (configs.PRESETS / "tokenizer" / "tiny.yaml").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["presets", "tokeniser/tiny"], "did you mean 'tokenizer/tiny'? presets: "),
        (["samples", "openmoji"], "did you mean 'sample'? known: "),
        (["zzzz"], "'zzzz'; known: "),
    ],
)
def test_a_near_miss_is_named(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert hint in capsys.readouterr().err
