"""A stop loses no work: signals to the process group, as torchrun, SLURM, Docker and a terminal send them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openpae import config as configs
from openpae.data.caches import cache_latents
from openpae.data.images import ImageFolder, PackedImages
from openpae.data.packing import pack_images
from openpae.data.settings import ImageData
from openpae.data.shards import Shards
from openpae.data.training import LatentBatch, TrainingLatents
from openpae.engine.loop import fit
from openpae.engine.run_folder import open_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import LightningDiTConfig, PAEConfig, RefinerConfig
from openpae.objective.settings import TokenizerLoss
from openpae.runtime.draws import Draws
from openpae.runtime.signals import Stopped
from openpae.storage.model_folder import checkpoint_steps
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.refiner import train_refiner
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import train_tokenizer
from tests.runtime.test_children import wait_for

LOOP = LoopConfig(
    steps=400_000,
    global_batch_size=4,
    precision="fp32",
    device="cpu",
    log_every=1,
    save_every=100_000,
    num_workers=1,
)
OPTIM = OptimConfig(lr=1e-4)
REFINER = RefinerConfig(
    feature_dim=48,
    latent_dim=8,
    grid_size=4,
    num_heads=4,
    decoder_layers=1,
    decoder_dim=32,
    decoder_heads=4,
)
TRAINERS = {RefinerRun: train_refiner, TokenizerRun: train_tokenizer, GeneratorRun: train_generator}
both = pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)


@pytest.fixture
def runs(
    tiny_config: PAEConfig, tiny_dit_config: LightningDiTConfig, image_folder: Path, latents: Shards
) -> dict[str, Any]:
    """A run of each stage that would take for ever, with a process that reads."""
    data = ImageData(images=image_folder, resize=36)
    alone = {"lpips": 0.0, "gan": 0.0, "ssr": 0.0, "mcr": 0.0, "scr": 0.0}
    return {
        "refiner": RefinerRun(
            model=REFINER,
            encoder="random-tiny",
            image_size=32,
            data=data,
            upsampler="bilinear",
            optim=OPTIM,
            loop=LOOP,
        ),
        "tokenizer": TokenizerRun(
            model=tiny_config, data=data, loss=TokenizerLoss(**alone), optim=OPTIM, loop=LOOP
        ),
        "generator": GeneratorRun(model=tiny_dit_config, latents=latents.folder, optim=OPTIM, loop=LOOP),
    }


def start_group(action: Callable[[], object], report: Path) -> int:
    """Run an action in a process group of its own; what it raises goes to the file. Returns the group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads
        child = os.fork()
    if not child:
        os.setsid()
        # A job that a shell starts in the background ignores SIGINT, and so would its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        error = ""
        try:
            action()
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        report.write_text(error)
        os._exit(0)
    return child


def steps_of(run_dir: Path) -> int:
    file = run_dir / "log.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


@both
@pytest.mark.parametrize("stage", ["refiner", "tokenizer", "generator"])
def test_a_signal_to_the_group_saves_while_others_read(
    runs: dict[str, Any], tmp_path: Path, stage: str, signum: signal.Signals
) -> None:
    run, run_dir, report = runs[stage], tmp_path / "run", tmp_path / "report"
    group = start_group(lambda: TRAINERS[type(run)](run, run_dir, quiet=True), report)
    wait_for(lambda: steps_of(run_dir) > 3 or report.is_file())
    os.killpg(group, signum)
    os.waitpid(group, 0)
    (step,) = checkpoint_steps(run_dir)
    assert report.read_text() == (
        f"Stopped: stopped by {signum.name} after step {step}; the same command goes on"
    )


@both
@pytest.mark.parametrize("stage", [pytest.param("tokenizer", marks=pytest.mark.slow), "generator"])
def test_a_signal_to_the_group_of_torchrun_saves(
    runs: dict[str, Any], tmp_path: Path, stage: str, signum: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    configs.save(runs[stage], tmp_path / "config.yaml")
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*started, "-m", "openpae", f"train-{stage}", str(tmp_path / "config.yaml"), str(run_dir)]
    with (tmp_path / "output").open("w") as output:
        group = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(lambda: steps_of(run_dir) > 3 or group.poll() is not None)
        os.killpg(group.pid, signum)
        group.wait(timeout=400)
    finally:
        group.kill()
    assert len(checkpoint_steps(run_dir)) == 1, (tmp_path / "output").read_text()[-2000:]


@both
@pytest.mark.parametrize("what", ["images", "latents"])
def test_packing_and_caching_go_on_after_a_signal_to_the_group(
    image_folder: Path, packed: PackedImages, tmp_path: Path, what: str, signum: signal.Signals
) -> None:
    """They save complete shards only: what is written stays."""

    def make(folder: Path, seconds: float) -> Shards:
        def encode(x: Any) -> Any:
            time.sleep(seconds)
            return x[:, :, ::8, ::8]

        def report(done: int, total: int) -> None:
            time.sleep(seconds)

        if what == "images":
            source = ImageFolder(image_folder)
            return pack_images(source, folder, size=32, per_shard=1, progress=report).shards
        return cache_latents(
            encode,
            packed,
            folder,
            image_size=32,
            latent_shape=(3, 4, 4),
            tokenizer_fingerprint="print",
            batch_size=1,
            per_shard=1,
        )

    folder = tmp_path / "folder"
    group = start_group(lambda: make(folder, 0.5), tmp_path / "report")
    wait_for(lambda: len(list(folder.glob("0*.npy"))) > 1)
    os.killpg(group, signum)
    os.waitpid(group, 0)
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("0*.npy")}
    assert 1 < len(kept) < 10
    made = make(folder, 0)
    assert made.fingerprint() == make(tmp_path / "undisturbed", 0).fingerprint()
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in folder.glob("0*.npy")}.items()


def test_a_second_sigterm_does_not_lose_the_step(runs: dict[str, Any], tmp_path: Path) -> None:
    """A scheduler sends one to the group, and torchrun hands its own on."""
    run = replace(runs["generator"], loop=replace(LOOP, num_workers=0))
    task = GeneratorTask(run)
    updates = task.updates

    def interrupted(batch: LatentBatch, draws: Draws, step: int) -> Iterator[Any]:
        for _ in range(2 * (step == 2)):
            os.kill(os.getpid(), signal.SIGTERM)
        return updates(batch, draws, step)

    task.updates = interrupted  # type: ignore[method-assign]
    open_run(tmp_path, run)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 3"):
        fit(task, tmp_path, run.optim, run.loop, quiet=True)
    assert checkpoint_steps(tmp_path) == [3]


class Deadly(TrainingLatents):
    """Latents that kill whoever reads them."""

    def __getitems__(self, positions: list[int]) -> LatentBatch:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(positions)


def test_a_dead_reader_of_latents_is_named_as_that(
    runs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openpae.train.generator.TrainingLatents", Deadly)
    with pytest.raises(ChildProcessError, match=r"process that reads latents died; .*killed by SIGKILL"):
        train_generator(runs["generator"], tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "run")
