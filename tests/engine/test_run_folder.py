"""A run goes on with the config that its checkpoints were made with, whatever was done to its config.yaml."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from openpae import config as configs
from openpae.data.shards import Shards
from openpae.engine.run_folder import check_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import LightningDiTConfig
from openpae.storage.model_folder import RUN_CONFIG, WEIGHTS, checkpoint_path, checkpoint_steps
from openpae.train.generator import train_generator
from openpae.train.settings import GeneratorRun


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
