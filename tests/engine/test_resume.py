"""A resumed run equals the uninterrupted one, to the bit; other data are rejected."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openpae import config as configs
from openpae.data.shards import Shards
from openpae.engine.loop import fit
from openpae.models.configs import DiscriminatorConfig
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps, identity_of
from openpae.train.settings import GeneratorRun, TokenizerRun
from tests.conftest import kill_points
from tests.engine.runs import (
    LOOP,
    OPTIM,
    STAGES,
    Tiny,
    curve,
    rewritten,
    same,
    state_of,
    state_of_tiny,
    tiny_run,
    train,
    train_until,
    with_loop,
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_the_uninterrupted_one(
    runs: dict[str, Any], tmp_path: Path, stage: str, precision: str
) -> None:
    """Bitwise, after two interruptions: before the first checkpoint, and between two."""
    run = with_loop(runs[stage], precision=precision)
    metrics = train(run, tmp_path / "full")
    train_until(run, tmp_path / "resumed", 1)
    assert checkpoint_steps(tmp_path / "resumed") == []
    train_until(run, tmp_path / "resumed", 5)
    assert checkpoint_steps(tmp_path / "resumed") == [2, 4]
    assert train(run, tmp_path / "resumed") == metrics
    assert same(state_of(tmp_path / "resumed"), state_of(tmp_path / "full"))
    assert curve(tmp_path / "resumed") == curve(tmp_path / "full")
    assert identity_of(tmp_path / "resumed") == identity_of(tmp_path / "full")


def test_a_resumed_run_of_all_losses_equals_the_uninterrupted_one(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    """A second player that joins later, a third that shares an optimizer, perturbations and augmentation."""
    loss = replace(
        tokenizer_run.loss,
        gan=0.5,
        gan_weight="adaptive",
        gan_start=0.6,
        discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
        discriminator_start=0.3,
        mcr=0.5,
        kl=1e-6,
        diffusion=0.1,
        gradients_every=3,
    )
    run = replace(tokenizer_run, loss=loss)
    train(run, tmp_path / "full")
    train_until(run, tmp_path / "resumed", 3)
    train_until(run, tmp_path / "resumed", 5)
    train(run, tmp_path / "resumed")
    full = state_of(tmp_path / "full")
    assert same(state_of(tmp_path / "resumed"), full)
    assert curve(tmp_path / "resumed") == curve(tmp_path / "full")
    assert full["players"].keys() == {"autoencoder", "denoiser", "discriminator"}
    terms = {key.removeprefix("autoencoder/") for key in curve(tmp_path / "full")[-2]}
    assert {"l1", "lpips", "gan", "mcr", "kl", "diffusion"} <= terms


def test_a_tokenizer_killed_while_saving_resumes(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    """A process of its own, dead by SIGKILL when its second checkpoint is about to be renamed into place."""
    configs.save(tokenizer_run, tmp_path / "run.yaml")
    code = f"""
import os, signal, sys, torch
from pathlib import Path
from openpae import config
from openpae.train.tokenizer import TokenizerRun, train_tokenizer
torch.set_num_threads(int(os.environ.get("OPENPAE_TEST_THREADS", "1")))
def hook(event, args):
    if event == "os.rename" and str(args[1]).endswith("step-00000004"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
train_tokenizer(config.load(TokenizerRun, {str(tmp_path / "run.yaml")!r}), Path({str(tmp_path / "killed")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".step-00000004.openpae-partial",
        "step-00000002",
    ]
    train(tokenizer_run, tmp_path / "killed")
    train(tokenizer_run, tmp_path / "full")
    assert same(state_of(tmp_path / "killed"), state_of(tmp_path / "full"))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_run_killed_between_any_two_file_operations_resumes(tmp_path: Path) -> None:
    loop = replace(LOOP, steps=2, save_every=1, keep_last=1, log_every=1)
    full = state_of_tiny(tmp_path / "full", loop)
    run_dir, deaths = tmp_path / "run", 0
    for _ in kill_points(lambda: tiny_run(run_dir, loop), tmp_path):
        assert same(state_of_tiny(run_dir, loop), full)
        assert [line["step"] for line in curve(run_dir)] == [1, 2, 2]
        left = {path.name for path in (run_dir / "checkpoints").iterdir()}
        assert left <= {"step-00000001", "step-00000002"}  # and no half-written folder
        shutil.rmtree(run_dir)
        deaths += 1
    assert deaths > 15


def test_a_finished_run_is_evaluated_again_and_not_changed(tmp_path: Path) -> None:
    first = tiny_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    log = curve(tmp_path / "run")
    again = Tiny()
    metrics = fit(again, tmp_path / "run", OPTIM, LOOP, quiet=True)
    assert metrics == {"bias": float(first.evaluations[-1][1]["bias"].sum())}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert curve(tmp_path / "run") == log


def test_one_seed_one_run(runs: dict[str, Any], tmp_path: Path) -> None:
    for stage, run in runs.items():
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            train(with_loop(run, seed=seed, steps=2), tmp_path / stage / name)
        a, b, c = (state_of(tmp_path / stage / name) for name in "abc")
        assert same(a, b)
        assert not same(a["exported"], c["exported"])


def test_a_resume_on_other_data_is_rejected(
    generator_run: GeneratorRun,
    tokenizer_run: TokenizerRun,
    latents: Shards,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    """The config names the same folders, but their content has changed."""
    for print_, labels, message in (
        (
            "another",
            latents.labels,
            "trained with other latents, tokenizer: the data that its config names have changed",
        ),
        (latents.attributes["tokenizer"], 1 - latents.labels, "trained with other latents: the data"),
    ):
        folder = tmp_path / print_ / "latents"
        shutil.copytree(latents.folder, folder)
        run = replace(generator_run, latents=folder, held_out_latents=None)
        train_until(run, tmp_path / print_ / "run", 3)
        rewritten(latents, folder, print_, labels)
        with pytest.raises(ValueError, match=message):
            train(run, tmp_path / print_ / "run")
    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    other = replace(tokenizer_run, data=replace(tokenizer_run.data, images=images))
    train_until(other, tmp_path / "tokenizer", 3)
    (images / "boxes" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"tokenizer was trained with other images: the data"):
        train(other, tmp_path / "tokenizer")


def test_a_resume_makes_up_for_a_lost_evaluation(tmp_path: Path) -> None:
    """Also in the middle of a run. An existing evaluation is not repeated."""
    loop = replace(LOOP, evaluate_every=2)
    tiny_run(tmp_path / "full", loop)
    for name, lost in (("lost", True), ("there", False)):
        shutil.copytree(tmp_path / "full", tmp_path / name)
        shutil.rmtree(checkpoint_path(tmp_path / name, 6))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines(keepends=True)
        if lost:
            kept = [line for line in lines if not ("eval/" in line and '"step": 4' in line)]
            assert len(kept) == len(lines) - 1
            (tmp_path / name / "log.jsonl").write_text("".join(kept))
        task = tiny_run(tmp_path / name, loop)
        assert [step for step, *_ in task.evaluations] == ([4, 6] if lost else [6])
        assert curve(tmp_path / name) == curve(tmp_path / "full")


def test_a_truncated_log_line_is_ignored(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run")
    full = curve(tmp_path / "run")
    file = tmp_path / "run" / "log.jsonl"
    file.write_text(file.read_text() + '{"step": 7, "mod')
    assert curve(tmp_path / "run") == full
    tiny_run(tmp_path / "run")
    assert curve(tmp_path / "run") == full
    assert all(json.loads(line) for line in file.read_text().splitlines())
