"""No two draws of an update share a name: they would be one and the same number."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openpae.data.images import PackedImages
from openpae.data.settings import ImageData
from openpae.data.shards import Shards
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import DiscriminatorConfig, LightningDiTConfig, PAEConfig, RefinerConfig
from openpae.models.encoders import encoder_fingerprint, load_encoder
from openpae.models.priors import Refiner
from openpae.models.saved import write_prior
from openpae.objective.settings import TokenizerLoss
from openpae.runtime.draws import Draws
from openpae.train.generator import GeneratorTask
from openpae.train.refiner import RefinerTask
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask

SIZES = RefinerConfig(
    feature_dim=48, latent_dim=8, grid_size=4, num_heads=4, decoder_layers=1, decoder_dim=32, decoder_heads=4
)
REST: dict[str, Any] = {
    "optim": OptimConfig(lr=1e-3),
    "loop": LoopConfig(steps=2, global_batch_size=4, precision="fp32", device="cpu"),
}


class Noted(Draws):
    """Notes which names are asked for."""

    def __init__(self, step: int) -> None:
        super().__init__(0, step, range(4), 4, torch.device("cpu"))
        self.names: Counter[str] = Counter()

    def normal(self, name: str, *shape: int) -> Tensor:
        self.names[name] += 1
        return super().normal(name, *shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        self.names[name] += 1
        return super().uniform(name, *shape)


def names_of(task: Any) -> Counter[str]:
    """Those of the last step's updates, by which time everything is switched on."""
    draws = Noted(1)
    assert list(task.updates(next(iter(task.batches(range(1, 2)))), draws, 1))
    return draws.names


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    folder = tmp_path / "prior"
    folder.mkdir()
    print_ = encoder_fingerprint(load_encoder("random-tiny"))
    write_prior(folder, Refiner(SIZES).state_dict(), SIZES, print_)
    return folder


def test_of_a_tokenizer_with_everything_on(tiny_config: PAEConfig, packed: PackedImages, prior: Path) -> None:
    loss = TokenizerLoss(
        lpips_net="random", kl=1e-6, diffusion=0.1, latent_noise=0.5, gan_start=0.0, discriminator_start=0.0,
        discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
    )  # fmt: skip
    data = ImageData(images=packed.shards.folder, augment="flip")
    names = names_of(
        TokenizerTask(TokenizerRun(model=tiny_config, prior=prior, data=data, loss=loss, **REST))
    )
    assert len(names) == 6
    assert set(names.values()) == {1}, names


@pytest.mark.parametrize("times", ["logit-normal", "uniform"])
def test_of_a_generator(tiny_dit_config: LightningDiTConfig, latents: Shards, times: Any) -> None:
    run = GeneratorRun(
        model=replace(tiny_dit_config, class_dropout=0.3), latents=latents.folder, times=times, **REST
    )
    names = names_of(GeneratorTask(run))
    assert len(names) == 3
    assert set(names.values()) == {1}, names


def test_a_refiner_draws_nothing(packed: PackedImages) -> None:
    data = ImageData(images=packed.shards.folder, augment="none")
    run = RefinerRun(
        model=SIZES, encoder="random-tiny", image_size=32, data=data, upsampler="bilinear", **REST
    )
    assert not names_of(RefinerTask(run))


def test_names_seeds_and_steps_give_numbers_of_their_own() -> None:
    """Of 2,000 numbers each, no two correlate by more than chance: 5 / sqrt(2000)."""
    device, rows = torch.device("cpu"), range(2000)
    drawn = [
        Draws(seed, step, rows, 2000, device).normal(name)
        for seed in (0, 1) for step in (0, 1, 10) for name in ("a", "b", "0")
    ]  # fmt: skip
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlations.abs().max() < 5 / 2000**0.5
