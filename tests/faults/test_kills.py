"""kill -9 at random moments: nothing that is left is corrupt, and the same command ends in the same bytes.

The moments are random; that a kill between any two file operations is survived is shown one by one in
test_storage, test_shards, test_images and test_engine.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from openpae.commands.describe import describe
from openpae.data.caches import cache_latents
from openpae.data.images import PackedImages
from openpae.data.settings import ImageData
from openpae.data.shards import Shards
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import DiscriminatorConfig, LightningDiTConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.saved import load_tokenizer
from openpae.models.tokenizer import PAE
from openpae.objective.settings import TokenizerLoss
from openpae.sampling.sample_set import SampleSet, write_samples
from openpae.sampling.sampler import balanced_labels
from openpae.sampling.settings import SamplerConfig
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps, identity_of
from openpae.train.generator import train_generator
from openpae.train.settings import GeneratorRun, TokenizerRun
from openpae.train.tokenizer import train_tokenizer
from tests.engine.runs import curve, same, state_of
from tests.faults.children import run_in_child

LOOP = LoopConfig(
    steps=8,
    global_batch_size=4,
    precision="fp32",
    device="cpu",
    ema_decay=0.8,
    log_every=2,
    save_every=2,
    evaluate_every=3,
)
OPTIM = OptimConfig(lr=1e-3, final_lr=1e-4, warmup_steps=2, weight_decay=0.1, clip=1.0)

few_or_many = pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
"""100 kills in all with -m slow."""


def survive(
    folder: Path, action: Callable[[Path], object], kills: int, check: Callable[[Path], None]
) -> None:
    """Do it once undisturbed and once killed again and again; look at what every kill leaves, and at the end.

    A kill comes at any moment of the time that the undisturbed one took. Once the disturbed one is done,
    another is begun, until there were enough kills.
    """
    whole, moments, done, rounds = folder / "whole", random.Random(0), 0, 0
    action(folder / "first")  # what Python loads on first use is loaded before the children are forked
    start = time.monotonic()
    action(whole)
    seconds = time.monotonic() - start
    while done < kills:
        disturbed, rounds = folder / f"disturbed {rounds}", rounds + 1
        for _ in range(min(4, kills - done)):
            ended = run_in_child(partial(action, disturbed), kill_after=moments.uniform(0, seconds))
            assert not ended.error, ended.trace
            if not ended.killed:
                break
            done += 1
            check(disturbed)
        ended = run_in_child(partial(action, disturbed))
        assert not ended.error, ended.trace
        compare(disturbed, whole)
        shutil.rmtree(disturbed)
        assert rounds < 10 * kills, "the kills come too late"


def compare(folder: Path, whole: Path) -> None:
    """Equal files; of a run, equal weights, optimizers, averages and log."""
    if (whole / "checkpoints").is_dir():
        assert same(state_of(folder), state_of(whole))
        assert curve(folder) == curve(whole)
        assert identity_of(folder) == identity_of(whole)
        assert names(folder / "checkpoints") == names(whole / "checkpoints")
    else:
        assert names(folder) == names(whole)
        assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names(whole))


def names(folder: Path) -> list[str]:
    """All files below a folder, hidden ones too: nothing half-written may be among them."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def sound_run(run_dir: Path) -> None:
    """Whatever is there after a kill passes pae info --verify, and every checkpoint can be loaded."""
    if not (run_dir / "config.yaml").is_file():
        return
    describe(run_dir, verify=True)
    for step in checkpoint_steps(run_dir):
        describe(checkpoint_path(run_dir, step), verify=True)
        torch.load(checkpoint_path(run_dir, step) / "state.pt", weights_only=True)


def sound_shards(folder: Path) -> None:
    """Complete and right, or not to be opened."""
    if (folder / "index.json").is_file():
        Shards(folder).verify()
    elif folder.exists():
        with pytest.raises(FileNotFoundError, match="is incomplete"):
            Shards(folder)


@few_or_many
def test_training_a_tokenizer_with_two_players(
    tiny_config: PAEConfig, image_folder: Path, tmp_path: Path, kills: int
) -> None:
    data = ImageData(images=image_folder, evaluation=image_folder, evaluation_images=2, resize=36)
    loss = TokenizerLoss(
        lpips=0.0,
        lpips_net="random",
        gan=0.5,
        gan_start=0.4,
        discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
        discriminator_start=0.2,
        ssr=0.0,
        mcr=0.0,
        scr=0.0,
    )
    run = TokenizerRun(model=tiny_config, data=data, loss=loss, optim=OPTIM, loop=LOOP)
    survive(tmp_path, lambda folder: train_tokenizer(run, folder, quiet=True), kills, sound_run)


@few_or_many
def test_training_a_generator(
    tiny_dit_config: LightningDiTConfig, latents: Shards, tmp_path: Path, kills: int
) -> None:
    run = GeneratorRun(
        model=tiny_dit_config,
        latents=latents.folder,
        held_out_latents=latents.folder,
        optim=OPTIM,
        loop=LOOP,
    )
    survive(tmp_path, lambda folder: train_generator(run, folder, quiet=True), kills, sound_run)


@few_or_many
def test_caching_latents(tokenizer_folder: Path, packed: PackedImages, tmp_path: Path, kills: int) -> None:
    model = load_tokenizer(tokenizer_folder)

    def cache(folder: Path) -> None:
        cache_latents(
            model.encode,
            packed,
            folder,
            image_size=32,
            latent_shape=model.config.latent_shape,
            tokenizer_fingerprint="print",
            batch_size=1,
            per_shard=1,
        )

    survive(tmp_path, cache, kills, sound_shards)


@few_or_many
@pytest.mark.parametrize("kind", ["npz", pytest.param("png", marks=pytest.mark.slow)])
def test_drawing_samples(
    tiny_pae: PAE, tiny_dit: LightningDiT, tmp_path: Path, kills: int, kind: str
) -> None:
    samples = SampleSet(
        labels=balanced_labels(24, 2),
        scheme="class-balanced",
        sampler=SamplerConfig(steps=4),
        batch_size=2,
        format=kind,  # type: ignore[arg-type]
        facts={"tokenizer": "a", "generator": "b"},
    )

    def sound(folder: Path) -> None:
        if (folder / "samples.json").is_file():
            assert (folder / ("samples.npz" if kind == "npz" else "images/000023.png")).is_file()
        elif (folder / "parts").exists():
            sound_shards(folder / "parts")

    survive(tmp_path, lambda out: write_samples(out, samples, tiny_pae, tiny_dit), kills, sound)
