"""A run goes on with the config that its checkpoints were made with, whatever was done to its config.yaml."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openpae import config as configs
from openpae.data.shards import Shards
from openpae.engine.run_folder import check_run, open_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import LightningDiTConfig
from openpae.storage.model_folder import RUN_CONFIG, WEIGHTS, checkpoint_path, checkpoint_steps
from openpae.train.generator import train_generator
from openpae.train.settings import GeneratorRun
from tests.engine.runs import STAGES, train, train_until, with_loop


@pytest.fixture
def run(tiny_dit_config: LightningDiTConfig, latents: Shards) -> GeneratorRun:
    loop = LoopConfig(steps=2, save_every=1, global_batch_size=4, precision="fp32", device="cpu")
    return GeneratorRun(model=tiny_dit_config, latents=latents.folder, optim=OptimConfig(lr=1e-3), loop=loop)


def test_a_config_that_was_edited_in_the_middle_is_noticed(run: GeneratorRun, tmp_path: Path) -> None:
    train_generator(run, tmp_path, quiet=True)
    kept = checkpoint_path(tmp_path, 2) / RUN_CONFIG
    assert configs.load(GeneratorRun, kept) == run
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.001", "lr: 0.002"))
    edited = configs.load(GeneratorRun, file)
    assert edited.optim.lr == 2e-3
    with pytest.raises(ValueError, match=r"config.yaml was edited: .*step 2 .*optim.lr: 0.001 -> 0.002"):
        train_generator(edited, tmp_path, quiet=True)
    file.write_bytes(kept.read_bytes())
    train_generator(configs.load(GeneratorRun, file), tmp_path, quiet=True)


def test_hardware_may_change_and_older_checkpoints_say_nothing(run: GeneratorRun, tmp_path: Path) -> None:
    train_generator(run, tmp_path, quiet=True)
    other = replace(run, loop=replace(run.loop, device_batch_size=2))
    assert not check_run(tmp_path, other)
    changed = replace(run, optim=OptimConfig(lr=1.0))
    configs.save(changed, tmp_path / "config.yaml")
    (checkpoint_path(tmp_path, 2) / RUN_CONFIG).write_text("damaged: [")
    with pytest.raises(ValueError, match=r"the checkpoint of step 1 was made with another config"):
        check_run(tmp_path, changed)
    for step in checkpoint_steps(tmp_path):
        (checkpoint_path(tmp_path, step) / RUN_CONFIG).unlink()
    assert check_run(tmp_path, changed)


def test_equal_runs_give_equal_files(run: GeneratorRun, tmp_path: Path) -> None:
    """safetensors orders its metadata anew in every call."""
    for number in range(8):
        train_generator(replace(run, loop=replace(run.loop, steps=1)), tmp_path / f"{number}", quiet=True)
    contents = {(checkpoint_path(tmp_path / f"{n}", 1) / WEIGHTS).read_bytes() for n in range(8)}
    assert len(contents) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_folder_rejects_another_config_and_names_the_difference(
    runs: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    run = with_loop(runs[stage], steps=2)
    train(run, tmp_path / "run")
    other = replace(run, optim=replace(run.optim, lr=2e-3), loop=replace(run.loop, ema_decay=None))
    with pytest.raises(ValueError, match="another config") as caught:
        train(other, tmp_path / "run")
    assert "loop.ema_decay: 0.8 -> None; optim.lr: 0.001 -> 0.002" in str(caught.value)
    assert configs.load(type(run), tmp_path / "run" / "config.yaml") == run
    train(configs.load(type(run), tmp_path / "run" / "config.yaml"), tmp_path / "run")


def test_a_run_may_resume_on_other_hardware(runs: dict[str, Any], tmp_path: Path) -> None:
    """Device batches, processes and workers say how it is computed, not what; config.yaml keeps the last."""
    run = with_loop(runs["generator"], steps=4)
    train_until(run, tmp_path, 3)
    other = with_loop(run, device_batch_size=4, num_workers=0, parallel="fsdp", profile_steps=0)
    train(other, tmp_path)
    assert checkpoint_steps(tmp_path) == [2, 4]
    assert configs.load(GeneratorRun, tmp_path / "config.yaml") == other


def test_a_run_folder_of_another_stage_is_rejected(runs: dict[str, Any], tmp_path: Path) -> None:
    open_run(tmp_path, runs["tokenizer"])
    with pytest.raises(ValueError, match="is of kind 'TokenizerRun', but a GeneratorRun is needed"):
        open_run(tmp_path, runs["generator"])
