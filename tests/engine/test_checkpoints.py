"""Checkpoints: a damaged one is skipped, the newest complete one is loaded, old ones are removed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openpae.engine import checkpoints
from openpae.engine.settings import LoopConfig
from openpae.storage.files import file_hash, write_json
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps
from tests.engine.runs import LOOP, STAGES, same, state_of, tiny_run, train


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        lambda f: (f / "state.pt").write_bytes((f / "state.pt").read_bytes()[:-1]),
        lambda f: (f / "state.pt").write_bytes(b"\x00" + (f / "state.pt").read_bytes()[1:]),
        lambda f: (f / "state.pt").unlink(),
        lambda f: (f / "checkpoint.json").write_text('{"step"'),
        lambda f: (f / "checkpoint.json").write_text("{}"),
        lambda f: shutil.rmtree(f) or f.mkdir(),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    tiny_run(tmp_path / "full")
    tiny_run(tmp_path / "run")
    spoil(checkpoint_path(tmp_path / "run", 6))
    with pytest.warns(UserWarning, match=r"checkpoint .*step-00000006 is damaged and was skipped: "):
        tiny_run(tmp_path / "run")
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "full"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_real_run_skips_a_damaged_checkpoint(runs: dict[str, Any], tmp_path: Path, stage: str) -> None:
    train(runs[stage], tmp_path / "run")
    expected = state_of(tmp_path / "run")
    folder = checkpoint_path(tmp_path / "run", 6)
    (folder / "state.pt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-00000006 is damaged and was skipped: its checksum is wrong"):
        train(runs[stage], tmp_path / "run")
    assert same(state_of(tmp_path / "run"), expected)


def test_a_checkpoint_of_an_older_layout_is_skipped_by_name(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run")
    file = checkpoint_path(tmp_path / "run", 6) / "checkpoint.json"
    facts = json.loads(file.read_text())
    del facts["inputs"]
    write_json(file, facts)
    with pytest.warns(UserWarning, match=r"step-00000006 is damaged and .* no valid inputs"):
        tiny_run(tmp_path / "run")


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    """Not the largest file, and not the last one written."""
    tiny_run(tmp_path / "run")
    old = checkpoint_path(tmp_path / "run", 4)
    (old / "model.safetensors").write_bytes(b"x" * 100_000)
    os.utime(old / "state.pt")
    task = tiny_run(tmp_path / "run")
    assert [step for step, *_ in task.evaluations] == [6]  # nothing was trained
    assert same(dict(task.model.state_dict()), state_of(tmp_path / "run")["players"]["model"])


def test_only_the_last_checkpoints_are_kept_and_the_last_step_is_one(tmp_path: Path) -> None:
    for keep, expected in ((1, [5]), (2, [4, 5]), (10, [2, 4, 5])):
        loop = replace(LOOP, steps=5, keep_last=keep)
        tiny_run(tmp_path / str(keep), loop)
        assert checkpoint_steps(tmp_path / str(keep)) == expected
        facts = json.loads((checkpoint_path(tmp_path / str(keep), 5) / "checkpoint.json").read_text())
        assert facts["images_seen"] == 20
        state = checkpoint_path(tmp_path / str(keep), 5) / "state.pt"
        weights = state.with_name("model.safetensors")
        assert facts["sha256"] == {file.name: file_hash(file) for file in (weights, state)}


def test_some_checkpoints_are_kept_for_good(tmp_path: Path) -> None:
    loop = replace(LOOP, steps=11, save_every=2, keep_last=2, keep_every=4)
    tiny_run(tmp_path, loop)
    assert checkpoint_steps(tmp_path) == [4, 8, 10, 11]


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    """A signal may save any step; killed in it, the next run saves others."""
    left = tmp_path / "run" / "checkpoints" / ".step-00000003.openpae-partial"
    left.mkdir(parents=True)
    (left / "state.pt").write_bytes(b"half")
    tiny_run(tmp_path / "run")
    assert not left.exists()


def test_a_kill_during_removal_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kill -9 between two files of a folder that is being removed."""
    for step in (1, 2, 3):
        folder = checkpoint_path(tmp_path, step)
        folder.mkdir(parents=True)
        for name in ("config.yaml", "model.safetensors"):
            (folder / name).touch()

    def killed(folder: Path) -> None:
        (folder / "config.yaml").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    loop = LoopConfig(steps=3, global_batch_size=1, keep_last=1)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove_old(tmp_path, loop, 3)
    assert checkpoint_steps(tmp_path) == [2, 3]
    for step in (2, 3):
        assert {file.name for file in checkpoint_path(tmp_path, step).iterdir()} == {
            "config.yaml",
            "model.safetensors",
        }


def test_old_checkpoints_are_removed_up_to_the_complete_one(tmp_path: Path) -> None:
    """A damaged newer one does not count and is kept, for its owner to inspect."""
    for step in range(6):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    loop = LoopConfig(steps=5, global_batch_size=1, save_every=1, keep_last=2, keep_every=2)
    checkpoints.remove_old(tmp_path, loop, 4)
    assert checkpoint_steps(tmp_path) == [2, 3, 4, 5]
