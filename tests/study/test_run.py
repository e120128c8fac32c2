"""Studies from end to end: finished stages are not repeated, and an interruption changes no number."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openpae import cli
from openpae.models.saved import load_generator, load_tokenizer
from openpae.study import once, work
from openpae.study.plan import Plan
from openpae.study.rehearse import estimates
from openpae.study.run import describe_plan, run_plan
from openpae.study.settings import StudyData, StudyRow
from tests.study.conftest import QUICK, planned, read, tiny


def numbers_of(plan: Plan, row: str = "none") -> dict[tuple[str, str], str]:
    return {(r["metric"], r["step"]): r["value"] for r in read(plan) if r["row"] == row}


def test_what_is_done_is_not_done_again(done: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a stage was done again")

    monkeypatch.setattr(work, "WORK", dict.fromkeys(work.WORK, never))
    before = read(done)
    assert run_plan(done, log=lambda _: None) == []
    assert read(done) == before
    assert "0 stages timed" in describe_plan(done, estimates(done), 1)


def test_training_state_goes_and_the_weights_stay(done: Plan) -> None:
    for run in done.runs:
        assert run.generator is not None
        shapes = [
            load(done.layout.folder(folder)).config.latent_shape
            for load, folder in ((load_tokenizer, run.tokenizer), (load_generator, run.generator))
        ]
        assert shapes == [(8, 4, 4)] * 2
    assert not list((done.layout.out / "stages").rglob("state.pt"))


def test_a_study_that_is_stopped_goes_on_to_the_same_numbers(
    done: Plan, data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(data, tmp_path, changes=QUICK, rows=["none"], seeds=[0])
    full = dict(work.WORK)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for kind in ("tokenizer", "latents", "judge"):  # before it, in turn
        monkeypatch.setattr(work, "WORK", full | {kind: stopped})
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, log=lambda _: None)
    monkeypatch.setattr(work, "WORK", full)
    run_plan(plan, log=lambda _: None)
    assert numbers_of(plan) == numbers_of(done)


def test_a_study_that_was_moved_in_the_middle_goes_on(
    done: Plan, data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of a run names folders. Unfinished runs get the new paths."""
    plan = planned(data, tmp_path / "old", changes=QUICK, rows=["none"], seeds=[0])

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    before = [stage for stage in plan.stages.values() if stage.kind in ("pack", "features")]
    for stage in before:
        once.run_stage(stage, plan.layout, commit="", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(once, "write_json", stopped)  # trained, and killed before it was recorded
        with pytest.raises(KeyboardInterrupt):
            once.run_stage(plan.stages[plan.runs[0].tokenizer], plan.layout, commit="", quiet=True)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = planned(data, tmp_path / "new", changes=QUICK, rows=["none"], seeds=[0])
    assert run_plan(moved, log=lambda _: None) == []
    assert numbers_of(moved) == numbers_of(done)


def test_a_row_whose_training_is_not_finite_does_not_stop_the_others(
    data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(data, tmp_path, changes=QUICK, rows=["none"], seeds=[0, 1])
    first = plan.runs[0].tokenizer
    full = dict(work.WORK)

    def train(stage: Any, layout: Any, quiet: bool) -> Any:
        if stage.id == first:
            raise FloatingPointError("training is not finite at step 1")
        return full["tokenizer"](stage, layout, quiet)

    monkeypatch.setattr(work, "WORK", full | {"tokenizer": train})
    (failure,) = run_plan(plan, log=lambda _: None)
    assert "none, seed 0" in failure
    assert "not finite" in failure
    assert {row["seed"] for row in read(plan)} == {"1"}


@pytest.mark.filterwarnings("ignore:eRank of .* images in 48 channels")
def test_a_tokenizer_from_elsewhere_is_measured_and_generated_from(data: StudyData, tmp_path: Path) -> None:
    """Two functions of a file: latents 3 x 4 x 4 by picking pixels."""
    file = tmp_path / "pick.py"
    file.write_text(
        "import torch\nimage_size = 32\n"
        "def encode(images):\n    return images[:, :, ::8, ::8]\n"
        "def decode(z):\n    return z.repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(0, 1)\n"
    )
    row = StudyRow(name="pick", tokenizer_from=f"python:{file}", set=("generator.model.latent_dim=3",))
    only = StudyRow(name="features", tokenizer_from="encoder:random-tiny/8", generate=False)
    study = tiny(rows=(row, only), claims=(), faster=None, seeds=(0,))
    plan = planned(data, tmp_path / "out", study, changes=QUICK)
    assert run_plan(plan, log=lambda _: None) == []
    metrics = {name: {r["metric"] for r in read(plan) if r["row"] == name} for name in ("pick", "features")}
    assert {"psnr", "lpc", "gfid"} <= metrics["pick"]
    assert {"gsq", "erank", "ssc"} <= metrics["features"]
    assert not {"psnr", "gfid"} & metrics["features"]


@pytest.mark.slow
def test_processes_give_the_numbers_of_one(done: Plan, data: StudyData, tmp_path: Path) -> None:
    plan = planned(data, tmp_path, changes=QUICK, rows=["none", "full"], seeds=[0])
    assert run_plan(plan, workers=2, log=lambda _: None) == []
    numbers = [[(r["row"], r["metric"], r["step"], r["value"]) for r in read(each)] for each in (plan, done)]
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process(done: Plan, data: StudyData, tmp_path: Path) -> None:
    """Gradients are summed in another order: the numbers agree to rounding."""
    folders = ["--images", data.images, "--held-out", data.held_out, "--out", tmp_path]
    maps = ["--label-images", data.label_images, "--label-maps", data.label_maps]
    chosen = ["--set", *QUICK, "--rows", "none", "--seeds", "0"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, "-m", "openpae", "study", "study/tiny", *folders, *maps, *chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
    with (tmp_path / "tiny" / "results.csv").open(encoding="utf-8") as file:
        values = {(r["metric"], r["step"]): float(r["value"]) for r in csv.DictReader(file)}
    expected = {(r["metric"], r["step"]): float(r["value"]) for r in read(done) if r["row"] == "none"}
    assert values == pytest.approx(expected, rel=0.01, abs=1e-4)


def test_the_command_prints_a_plan(done: Plan, data: StudyData, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--images", str(data.images), "--held-out", str(data.held_out), "--out", str(done.layout.out)]
    maps = ["--label-images", str(data.label_images), "--label-maps", str(data.label_maps)]
    chosen = ["--set", *QUICK, "--rows", "none", "full", "--seeds", "0"]
    cli.main(["study", "study/tiny", *folders, *maps, *chosen, "--dry-run"])
    assert f"{len(done.stages)} stages, {len(done.stages)} of them done" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", *folders])
    assert stop.value.code == 2
    assert "needs at least one STUDY" in capsys.readouterr().err
