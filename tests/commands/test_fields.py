"""The help of training commands: the ten fields, all fields, and their true defaults."""

from __future__ import annotations

import re
from typing import Any

import pytest

from openpae import config as configs
from openpae.cli import main
from openpae.commands.fields import OFTEN_CHANGED, field_docs, short_help
from openpae.engine.settings import OptimConfig
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

COMMAND_OF: dict[str, tuple[str, type[Any]]] = {
    "refiner": ("train-refiner", RefinerRun),
    "tokenizer": ("train-tokenizer", TokenizerRun),
    "generator": ("train-generator", GeneratorRun),
}
PRESETS = [name for name in configs.preset_names() if name.partition("/")[0] in COMMAND_OF]


def flat(config: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Dotted path -> value."""
    values = {}
    for key, value in config.items():
        path = f"{at}{key}"
        values |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return values


def as_help(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, str]:
    """Field -> the default in the help."""
    with pytest.raises(SystemExit) as stop:
        main([*argv])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join("" if line[:1] in ("╭", "╰") else line.strip(" │") for line in lines)
    defaults = {}
    for entry in re.split(r"\n--(?=[a-z])", text):
        if default := re.search(r"\(default: ?(.*?)\)$", " ".join(entry.partition("\n\n")[0].split())):
            defaults[entry.split()[0].rstrip(",").replace("-", "_")] = default[1]
    return defaults


@pytest.mark.parametrize("preset", PRESETS)
def test_the_defaults_in_the_help_are_those_of_the_preset(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, kind = COMMAND_OF[preset.partition("/")[0]]
    config = configs.load(kind, preset)
    values = {name: as_help(value) for name, value in flat(configs.to_dict(config)).items()}
    everything = shown(capsys, command, preset, "--help-all")
    assert {name: values[name] for name in everything if name in values} == {
        name: everything[name] for name in everything if name in values
    }
    # A config that is absent has no flag: only a file can add it.
    absent = {"loss.ssr_low_pass", "loss.discriminator"}
    assert {name for name in values if not name.endswith("kind")} <= everything.keys() | absent
    ten = shown(capsys, command, preset, "--help")
    assert tuple(ten) == OFTEN_CHANGED[kind.__name__]
    assert ten == {name: values[name] for name in ten}


def test_the_short_help_has_ten_fields() -> None:
    assert {len(fields) for fields in OFTEN_CHANGED.values()} == {10}
    text = short_help(configs.load(RefinerRun, "refiner/tiny"), "pae x", ["optim.lr"])
    assert "  --optim.lr\n      Learning rate at its highest. (default: 0.001)" in text
    assert field_docs(OptimConfig)["lr"] == "Learning rate at its highest."
