"""Each flag of the sampler arrives where samples are drawn."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from openpae import config as configs
from openpae.commands.sampler import SamplerChoice
from openpae.sampling.settings import SamplerConfig

FLAGS: dict[str, Any] = {
    "solver": "heun", "steps": 17, "shift": 0.9, "guidance": 1.7, "guidance_start": 0.4, "guidance_end": 0.8
}  # fmt: skip
"""Values that no preset has."""


def test_every_setting_of_the_sampler_has_its_flag_here() -> None:
    """But the error of rk45 and what a search says, which have none."""
    assert set(FLAGS) == {part.name for part in fields(SamplerConfig)} - {"tolerance", "tuned_on"}


@pytest.mark.parametrize("preset", ["official-250", "fast-28", "fast-45", "few-15"])
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_changes_its_setting_and_no_other(name: str, preset: str) -> None:
    base = configs.load(SamplerConfig, f"sampler/{preset}")
    assert getattr(base, name) != FLAGS[name]
    config = SamplerChoice(preset=preset, **{name: FLAGS[name]}).config()
    assert config == replace(base, **{name: FLAGS[name]})


def test_all_flags_together() -> None:
    config = SamplerChoice(**FLAGS).config()
    assert config == replace(configs.load(SamplerConfig, "sampler/official-250"), **FLAGS)


def test_a_preset_that_was_tuned_is_so_until_its_guidance_is_changed(tmp_path: Any) -> None:
    tuned = SamplerConfig(steps=5, guidance=1.3, tuned_on="something")
    configs.save(tuned, tmp_path / "best.yaml")
    for name, value in FLAGS.items():
        config = SamplerChoice(preset=str(tmp_path / "best.yaml"), **{name: value}).config()
        assert config.tuned_on == (None if name.startswith("guidance") else "something"), name
