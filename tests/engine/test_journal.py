"""TensorBoard shows the values of log.jsonl, and repeated steps of a resumed run once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from openpae.engine.journal import Journal, read_log
from openpae.engine.settings import LoopConfig, lr_at
from tests.engine.runs import LOOP, OPTIM, tiny_run

TEN_STEPS = LoopConfig(steps=10, global_batch_size=4)


def shown(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """The points of a curve, as TensorBoard reads them."""
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_tensorboard_reads_what_the_log_says(tmp_path: Path) -> None:
    log = Journal(tmp_path, 0, TEN_STEPS)
    with log:
        log.write(2, {"a/loss": 0.5, "lr": 1e-3})
        log.write(4, {"a/loss": 0.25})
    assert shown(tmp_path, "a/loss") == [(2, 0.5), (4, 0.25)]
    assert shown(tmp_path, "lr") == [(2, pytest.approx(1e-3))]
    assert [line["a/loss"] for line in read_log(tmp_path)] == [0.5, 0.25]


def test_repeated_steps_are_shown_once(tmp_path: Path) -> None:
    first = Journal(tmp_path, 0, TEN_STEPS)
    with first:
        for step in (2, 4, 6):
            first.write(step, {"loss": float(step)})
    second = Journal(tmp_path, 2, TEN_STEPS)
    with second:
        second.write(4, {"loss": 40.0})
    assert shown(tmp_path, "loss") == [(2, 2.0), (4, 40.0)]
    assert [line["loss"] for line in read_log(tmp_path)] == [2.0, 40.0]


def test_the_log_has_means_and_counts_images(tmp_path: Path) -> None:
    losses: list[float] = []

    def noting(step: int, loss: Tensor) -> Tensor:
        losses.append(float(loss.detach()))
        return loss

    loop = replace(LOOP, save_every=100, evaluate_every=4)
    tiny_run(tmp_path / "run", loop, spoil=noting)
    lines = read_log(tmp_path / "run")
    assert [(line["step"], line["images_seen"]) for line in lines] == [(3, 12), (4, 16), (6, 24), (6, 24)]
    assert lines[0]["model/loss"] == pytest.approx(np.mean(losses[:6]))
    assert lines[2]["model/loss"] == pytest.approx(np.mean(losses[6:]))
    assert lines[0].keys() == {
        *("step", "images_seen", "lr", "images_per_second", "peak_memory_gib"),
        *("model/loss", "model/error", "model/size", "model/grad_norm"),
    }
    assert lines[1].keys() == lines[3].keys() == {"step", "images_seen", "eval/bias"}
    assert lines[0]["lr"] == lr_at(2, OPTIM, 6)
    assert any((tmp_path / "run" / "tensorboard").iterdir())
