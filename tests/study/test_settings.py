"""Configs of studies: changes apply in order, and contradictions are rejected."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from openpae import config as configs
from openpae.study.settings import Claim, Reported, StudyRow, StudySetup, resolve
from tests.study.conftest import tiny

SETUPS = sorted((configs.PRESETS / "study" / "setup").glob("*.yaml"))


def test_changes_apply_in_order_and_strictly() -> None:
    setup = configs.load(StudySetup, "study/setup/tiny")
    parts = resolve(
        setup, ["tokenizer.loss.mcr=0.5", "tokenizer.loss.mcr=0.25", "tokenizer.loss.mcr_angles=[10.0, 20]"]
    )
    assert parts.tokenizer.loss.mcr == 0.25
    assert parts.tokenizer.loss.mcr_angles == (10.0, 20.0)
    for change, message in (
        ("tokenizer.loss.mcrr=1.0", "unknown key tokenizer.loss.mcrr; did you mean 'mcr'"),
        ("tokenizer.los.mcr=1.0", "unknown key tokenizer.los.mcr"),
        ("tokenizer.loss.mcr=2e-4", r"tokenizer.loss.mcr must be float.*write 0.0002"),
        ("tokenizer.loss.mcr=-1", "loss.mcr must be >= 0"),
        ("sampler.steps=3", "STAGE one of refiner, tokenizer, generator, measure, judge"),
        ("tokenizer.loss.mcr", "a change must be STAGE.FIELD=VALUE"),
        ("tokenizer.loss.mcr=[1", "is not YAML"),
        ("tokenizer.data.images=elsewhere", "a study sets data.images itself"),
        ("generator.loop.seed=3", "a study sets loop.seed itself"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            resolve(setup, [change])


def test_a_change_reaches_a_deeply_nested_field() -> None:
    """Each level of dots is one config; the fields beside the changed one stay."""
    setup = configs.load(StudySetup, "study/setup/tiny")
    before, after = (
        resolve(setup, changes)
        for changes in ([], ["tokenizer.model.decoder.mlp_dim=48", "judge.sampler.guidance_start=0.5"])
    )
    assert after.tokenizer.model.decoder.mlp_dim == 48
    assert after.judge.sampler.guidance_start == 0.5
    decoder = dataclasses.replace(
        after.tokenizer.model.decoder, mlp_dim=before.tokenizer.model.decoder.mlp_dim
    )
    assert decoder == before.tokenizer.model.decoder
    assert (
        dataclasses.replace(after.judge.sampler, guidance_start=before.judge.sampler.guidance_start)
        == before.judge.sampler
    )
    assert after.generator == before.generator


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokenizer.model.decoder.mlp=48", "unknown key tokenizer.model.decoder.mlp; did you mean 'mlp_dim'"),
        ("tokenizer.model.decoder.mlp_dim.x=1", "unknown key tokenizer.model.decoder.mlp_dim.x"),
        ("tokenizer.model.decoder.mlp_dim=[48]", "tokenizer.model.decoder.mlp_dim must be int"),
        ("tokenizer.model..mlp_dim=48", "unknown key tokenizer.model..mlp_dim"),
        ("judge.sampler.guidance_start=2", "guidance_start"),
    ],
)
def test_a_wrong_change_of_a_nested_field_is_named_in_full(change: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        resolve(configs.load(StudySetup, "study/setup/tiny"), [change])


def test_a_study_that_contradicts_itself_is_refused() -> None:
    row = StudyRow(name="a")
    for changes, message in (
        ({"rows": (row, row)}, "rows must differ, got 'a' more than once"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"rows": ()}, "at least one row"),
        ({"name": "a b"}, "letters, digits"),
        ({"faster": "b"}, "no row 'b'"),
        ({"claims": (Claim(text="", metric="ssc", better="full", worse="x"),)}, "no row 'x', which a claim"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)
    with pytest.raises(ValueError, match="changes to the presets of tokenizer and refiner would have no"):
        StudyRow(name="vae", tokenizer_from="diffusers:a/b", set=("tokenizer.loss.ssr=1.0",))


@pytest.mark.parametrize("file", SETUPS, ids=lambda file: file.stem)
def test_every_setup_loads(file: Path) -> None:
    assert resolve(configs.load(StudySetup, file), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_of_a_study_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="x must be a finite number"):
        StudyRow(name="a", x=value)
    for name in ("ssc", "lpc", "gsq", "rfid", "gfid"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            Reported(**{name: value})
