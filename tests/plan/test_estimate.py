"""Plans: device batches that fit, time, and problems of the config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from openpae import config as configs
from openpae.cli import main
from openpae.plan.estimate import largest_fit, plan_data, plan_run
from openpae.plan.settings import PlanSettings
from openpae.plan.trial import planned_run, try_run
from openpae.runtime.cards import CARDS, card_of
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from tests.plan.test_trial import tiny

RUNS: list[type[Any]] = [RefinerRun, TokenizerRun, GeneratorRun]
PRESETS = sorted(
    file for file in configs.PRESETS.rglob("*.yaml") if configs.read_yaml(file)["kind"].endswith("Run")
)


def test_the_largest_device_batch_fits_and_the_next_does_not() -> None:
    run = tiny("generator")
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, global_batch_size=64))
    free = int(1.1 * try_run(planned_run(run, global_batch_size=64, device_batch_size=16)).peak.total)
    fit = largest_fit(run, 1, free)
    assert fit.device_batch == 16
    assert 16 <= fit.largest < 32
    assert fit.peak <= free
    assert largest_fit(run, 1, 1000).device_batch == 0


def test_time_and_disk_by_hand() -> None:
    plan = plan_run(tiny("generator"), PlanSettings(gpus=2, card="a100", utilisation=0.5, images=10))
    rate = 2 * 0.5 * CARDS["a100"].full / plan.trial.operations["float32"]  # tiny trains in float32
    assert plan.images_per_second == pytest.approx(rate)
    assert plan.hours == pytest.approx(20 * 8 / rate / 3600)
    assert plan.checkpoint_bytes == 20 * plan.trial.trained
    assert plan.cache_bytes == {"latents": 10 * 2 * 2 * 8 * 4 * 4}
    assert not plan.problems


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "generator/tiny", "--gpus", "3", "--loop.device_batch_size", "4"])
    out = capsys.readouterr().out
    assert "problem: loop.global_batch_size 8 is no multiple of 3 GPUs; planned for 6" in out
    assert "problem: loop.device_batch_size 4 does not divide the 2 images that each of 3 GPUs sees" in out
    assert "none: no step waits" in out


def test_a_run_that_does_not_fit_gets_device_batches_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(CARDS["4090"], gib=2.5e-3)
    monkeypatch.setitem(CARDS, "4090", small)
    run = tiny("generator")
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, global_batch_size=64))
    (problem,) = plan_run(run, PlanSettings(card="4090")).problems
    assert "a device batch of 64 needs" in problem
    assert "set loop.device_batch_size" in problem


def test_json_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "refiner/tiny", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["peak"]["total"] == sum(data["peak"]["bytes"].values())
    for arguments, message in (
        (["generator/tiny", "--card", "gtx"], "--card must be one of b200"),
        (["generator/tiny", "--gpus", "0"], "--gpus must be >= 1, got 0"),
        ([], "pae plan needs CONFIG"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["plan", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_cards_are_known_by_their_drivers_names() -> None:
    assert card_of("NVIDIA A100-SXM4-40GB") is CARDS["a100-40"]
    assert card_of("NVIDIA H100 PCIe") is CARDS["h100-pcie"]
    assert card_of("NVIDIA H100 80GB HBM3") is CARDS["h100"]
    assert card_of("some CPU") is None


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda file: str(file.relative_to(configs.PRESETS)))
def test_every_preset_is_planned(preset: Path) -> None:
    """The device batch of each preset fits the card that it is meant for."""
    data = plan_data(plan_run(configs.load_one_of(RUNS, preset), PlanSettings(card="h100")))
    assert not data["problems"]
    assert json.dumps(data)
