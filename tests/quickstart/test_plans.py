"""The budget suffices for the fewest steps, is extended, or is rejected; each stage gets a share."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpae.quickstart import plans
from openpae.quickstart.plans import LEAST_STEPS, Timing, least_seconds, settle, timed
from openpae.quickstart.workers import Speed, Workers

QUICK = Speed(workers=Workers(processes=2), tokenizer=0.1, generator=0.1)
SLOW = Speed(workers=Workers(threads=2), tokenizer=4.0, generator=1.0)


def test_the_quickest_workers_are_taken_and_a_budget_that_pays_stays() -> None:
    timing, lines = settle([QUICK, SLOW], 720, strict=True)
    assert timing == Timing(workers=QUICK.workers, seconds=720)
    assert "2 processes of 1 thread: 0.10 s" in lines[0]
    assert "1 process of 2 threads: 4.00 s" in lines[1]
    assert lines[2] == "taking 2 processes of 1 thread"


def test_a_budget_that_does_not_pay_for_the_fewest_steps_is_extended() -> None:
    timing, lines = settle([SLOW], 720, strict=False)
    assert timing.seconds == least_seconds(SLOW) > 720
    assert settle([SLOW], 720, spent=100, strict=False)[0].seconds == timing.seconds + 100
    assert settle([QUICK], 720, spent=700, strict=False)[0].seconds > 720
    steps = LEAST_STEPS["refiner"] + LEAST_STEPS["tokenizer"]
    assert timing.seconds > steps * SLOW.tokenizer + LEAST_STEPS["generator"] * SLOW.generator
    for text in ("budget of 12 min is too short", str(LEAST_STEPS["tokenizer"]), "going on for that long"):
        assert text in lines[-1]


def test_a_strict_budget_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match=r"12 min is too short.*give --budget \d+min, or leave out"):
        settle([SLOW], 720, strict=True)


def test_the_choice_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "timing.json"
    assert plans.read_timing(file) is None
    timing = Timing(workers=Workers(processes=2, threads=3), seconds=800.5)
    plans.write_timing(file, timing, [QUICK])
    assert plans.read_timing(file) == timing


@pytest.mark.parametrize("name", ["refiner", "tokenizer", "generator"])
def test_a_stage_follows_the_clock_and_does_not_fall_below_the_floor(tmp_path: Path, name: str) -> None:
    run = getattr(plans, f"{name}_run")(tmp_path, 7)
    assert run.loop.seed == 7
    assert run.loop.seconds is None
    loop = timed(run, name, 100.0, trial=False).loop
    assert 0 < loop.seconds <= 100
    assert loop.least_steps == LEAST_STEPS[name] <= loop.steps
    assert timed(run, name, 100.0, trial=True).loop.least_steps == 1


def test_the_stages_read_and_write_below_one_folder(tmp_path: Path) -> None:
    tokenizer, generator = plans.tokenizer_run(tmp_path, 0), plans.generator_run(tmp_path, 0)
    assert tokenizer.prior == tmp_path / "refiner"
    assert tokenizer.data.images == tmp_path / "data" / "train"
    assert tokenizer.data.evaluation == tmp_path / "data" / "held-out"
    assert tokenizer.data.feature_cache == plans.refiner_run(tmp_path, 0).data.feature_cache
    assert generator.latents == tmp_path / "latents" / "train"
    assert generator.held_out_latents == tmp_path / "latents" / "held-out"
