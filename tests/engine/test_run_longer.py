"""A run with more steps than before goes on; at a constant rate as if it had had them from the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openpae import config as configs
from openpae.engine.journal import read_log
from openpae.engine.run_folder import continued
from openpae.engine.settings import OptimConfig, lr_at
from openpae.train.settings import TokenizerRun
from tests.engine.runs import STAGES, curve, same, state_of, train, train_until, with_loop

CONSTANT = OptimConfig(lr=1e-3, warmup_steps=2, weight_decay=0.1, clip=1.0)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_a_longer_run_equals_one_that_was_longer_from_the_start(
    runs: dict[str, Any], tmp_path: Path, stage: str, finished: bool
) -> None:
    long = replace(with_loop(runs[stage], steps=6), optim=CONSTANT)
    train(long, tmp_path / "long")
    short = with_loop(long, steps=3)
    if finished:
        train(short, tmp_path / "run")
    else:
        train_until(short, tmp_path / "run", 2)
    train_until(continued(tmp_path / "run", long), tmp_path / "run", 5)  # and is interrupted once more
    train(long, tmp_path / "run")
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "long"))
    assert configs.load(type(long), tmp_path / "run" / "config.yaml").loop.extended_from == (3,)


def test_a_decaying_rate_decays_again_from_the_old_end(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_loop(runs["generator"], steps=4, log_every=1)
    assert run.optim.final_lr is not None
    train(run, tmp_path)
    longer = with_loop(run, steps=8)
    train(longer, tmp_path)
    rates = [line["lr"] for line in read_log(tmp_path) if "lr" in line]
    assert rates == [lr_at(step, run.optim, 4) for step in range(4)] + [
        lr_at(step, run.optim, 8, [4]) for step in range(4, 8)
    ]
    assert rates[3] == rates[7] == pytest.approx(run.optim.final_lr)
    assert rates[4] == run.optim.lr
    said = capsys.readouterr().err
    assert "8 steps in place of 4; from step 4 on the learning rate falls again from 0.001 to 0.0001" in said
    assert [line for line in curve(tmp_path) if "loop/steps" in line] == [
        {"step": 4, "images_seen": 16, "loop/steps": 8}
    ]
    train(with_loop(run, steps=9), tmp_path)  # longer once more
    assert configs.load(type(run), tmp_path / "config.yaml").loop.extended_from == (4, 8)


def test_starts_of_losses_are_shares_of_the_first_schedule(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    """With MCR from half of four steps on, four more steps do not take it away again."""
    loss = replace(tokenizer_run.loss, mcr=0.5, mcr_start=0.5, mcr_angle_ramp=0.5)
    run = with_loop(replace(tokenizer_run, loss=loss), steps=4, log_every=1)
    train(run, tmp_path)
    train(with_loop(run, steps=8), tmp_path)
    lines = [line for line in read_log(tmp_path) if "autoencoder/loss" in line]
    assert ["autoencoder/mcr" in line for line in lines] == [False] * 2 + [True] * 6
    reached = [line["autoencoder/angle_m"] for line in lines[4:]]
    assert reached == pytest.approx([42.5] * 4, abs=4)  # a random direction is not quite orthogonal


def test_what_is_not_the_result_may_change_at_any_time(runs: dict[str, Any], tmp_path: Path) -> None:
    run = with_loop(runs["tokenizer"], steps=4)
    train(run, tmp_path / "plain")
    train_until(run, tmp_path / "run", 3)
    other = with_loop(run, log_every=1, save_every=1, keep_last=4, evaluate_every=2)
    other = replace(other, data=replace(other.data, evaluation_images=2))
    train(other, tmp_path / "run")
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "plain"))
    assert configs.load(type(run), tmp_path / "run" / "config.yaml") == other


def test_a_run_cannot_become_shorter_or_change_its_ends(runs: dict[str, Any], tmp_path: Path) -> None:
    run = with_loop(runs["generator"], steps=4)
    train(run, tmp_path)
    with pytest.raises(ValueError, match=r"another config \(loop.steps: 4 -> 3\)"):
        train(with_loop(run, steps=3), tmp_path)
    with pytest.raises(ValueError, match=r"another config \(loop.extended_from: .*3"):
        train(with_loop(run, steps=8, extended_from=(3,)), tmp_path)


@pytest.mark.parametrize("ends", [(0,), (4,), (3, 2), (2, 2)])
def test_ends_that_are_no_ends_are_refused(runs: dict[str, Any], ends: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"loop.extended_from must be ascending, in \[1, steps = 4\)"):
        with_loop(runs["generator"], steps=4, extended_from=ends)
