"""TensorBoard shows what log.jsonl says, and what a resumed run does again it shows once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openpae.engine.journal import Journal, read_log
from openpae.engine.settings import LoopConfig

LOOP = LoopConfig(steps=10, global_batch_size=4)


def shown(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """The points of a curve, as TensorBoard reads them."""
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_tensorboard_reads_what_the_log_says(tmp_path: Path) -> None:
    log = Journal(tmp_path, 0, LOOP)
    with log:
        log.write(2, {"a/loss": 0.5, "lr": 1e-3})
        log.write(4, {"a/loss": 0.25})
    assert shown(tmp_path, "a/loss") == [(2, 0.5), (4, 0.25)]
    assert shown(tmp_path, "lr") == [(2, pytest.approx(1e-3))]
    assert [line["a/loss"] for line in read_log(tmp_path)] == [0.5, 0.25]


def test_steps_that_happen_again_are_shown_once(tmp_path: Path) -> None:
    first = Journal(tmp_path, 0, LOOP)
    with first:
        for step in (2, 4, 6):
            first.write(step, {"loss": float(step)})
    second = Journal(tmp_path, 2, LOOP)
    with second:
        second.write(4, {"loss": 40.0})
    assert shown(tmp_path, "loss") == [(2, 2.0), (4, 40.0)]
    assert [line["loss"] for line in read_log(tmp_path)] == [2.0, 40.0]
