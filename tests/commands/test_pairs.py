"""A pair stands for its tokenizer and its generator in every command that takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpae.cli import main
from openpae.commands.pairs import with_pairs
from openpae.storage.model_folder import identity_of
from openpae.storage.pairs import PACKAGED

PAIR = PACKAGED / "openmoji"
TOKENIZER, GENERATOR = str(PAIR / "tokenizer"), str(PAIR / "generator")


@pytest.mark.parametrize("name", ["openmoji", str(PAIR)])
def test_a_pair_is_both_models(name: str) -> None:
    for command in ("sample", "search-guidance"):
        assert with_pairs(command, [name, "out"]) == [TOKENIZER, GENERATOR, "out"]
    for command in ("reconstruct", "cache-latents"):
        assert with_pairs(command, [name, "images", "out"]) == [TOKENIZER, "images", "out"]
    assert with_pairs("profile", [name, "encoder:x", "--images", name]) == [
        *(TOKENIZER, "encoder:x", "--images", name)
    ]
    seeds = ["--seeds", "0", "1", "--label", "0"]
    assert with_pairs("interpolate", [name, "out", *seeds]) == [
        *(TOKENIZER, "out", *seeds, "--generator", GENERATOR)
    ]
    assert with_pairs("interpolate", [name, "out", "--images", "a", "b"])[:2] == [TOKENIZER, "out"]
    assert with_pairs("evaluate", ["ref", "--generator", name]) == [
        *("ref", "--generator", GENERATOR, "--tokenizer", TOKENIZER)
    ]
    assert with_pairs("evaluate", ["ref", "--tokenizer", name]) == ["ref", "--tokenizer", TOKENIZER]
    for command in ("info", "push", "demo"):
        assert with_pairs(command, [name]) == [str(PAIR)]


@pytest.mark.parametrize("command", ["sample", "profile", "evaluate", "info", "pack", "reconstruct"])
def test_other_arguments_stay(command: str) -> None:
    argv = ["tokenizer", "generator", "out", "--generator", "g", "--tokenizer", "t"]
    assert with_pairs(command, argv) == argv
    assert with_pairs(command, []) == []


def test_the_pair_is_sampled_as_its_two_folders_are(tmp_path: Path) -> None:
    options = ["--count", "2", "--steps", "2", "--format", "latents"]
    main(["sample", "openmoji", str(tmp_path / "one"), *options])
    main(["sample", TOKENIZER, GENERATOR, str(tmp_path / "two"), *options])
    one, two = ((tmp_path / name / "latents.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_info_knows_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "openmoji"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == ["what", "a pair: a tokenizer and a generator of its latents"]
    made = identity_of(PAIR / "generator").fingerprint
    assert any(line.startswith("generator fingerprint") and line.endswith(made) for line in lines)
