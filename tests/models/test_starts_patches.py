"""The start `patches`: the first decodes already show the images."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.models.configs import PAEConfig
from openpae.models.starts import start_from_patches
from openpae.models.tokenizer import build_tokenizer
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask


def smooth_images(count: int, seed: int) -> Tensor:
    """Images of three waves a colour, 32 pixels, in [0, 1]: few directions hold all of their patches."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)


@torch.no_grad()
def test_new_images_pass_a_started_tokenizer(tiny_config: PAEConfig) -> None:
    """Unseen images lose less than half of their variance; with random weights, all of it."""
    model = build_tokenizer(tiny_config)
    x = smooth_images(64, seed=1)
    before = F.mse_loss(model.decode(model.encode(x)), x)
    start_from_patches(model, smooth_images(64, seed=0))
    error = F.mse_loss(model.decode(model.encode(x)), x)
    assert error < 0.5 * x.var() < before


@torch.no_grad()
def test_the_readout_is_the_best_linear_one(tiny_config: PAEConfig) -> None:
    """Least squares: any change of the last layer increases the error on the images of the fit."""
    model, x = build_tokenizer(tiny_config), smooth_images(64, seed=0)
    start_from_patches(model, x)
    z = model.encode(x)
    best = F.mse_loss(model.decode(z), x)
    for part in (model.decoder.to_pixels.weight, model.decoder.to_pixels.bias):
        moved = 0.05 * torch.randn_like(part)
        part += moved
        assert F.mse_loss(model.decode(z), x) > best
        part -= moved


def test_latents_stay_on_the_sphere_and_gradients_reach_every_weight(tiny_config: PAEConfig) -> None:
    """Two steps: the first moves the branches off 0; after it all weights get a gradient."""
    model, x = build_tokenizer(tiny_config), smooth_images(8, seed=0)
    start_from_patches(model, x)
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        z = model.encode(x)
        F.mse_loss(model.decode(z), x).backward()
        optimizer.step()
    torch.testing.assert_close(z.square().mean(dim=1), torch.ones(8, 4, 4), rtol=0, atol=1e-4)
    still = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert still == []


def test_cached_features_give_the_same_start(tiny_config: PAEConfig) -> None:
    x = smooth_images(16, seed=0)
    states = []
    for cached in (False, True):
        torch.manual_seed(0)
        model = build_tokenizer(tiny_config)
        start_from_patches(model, x, model.features(x) if cached else None)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("fusion", ["add", "concat", "finetune"])
def test_other_fusions_are_refused(tiny_config: PAEConfig, fusion: str) -> None:
    model = build_tokenizer(dataclasses.replace(tiny_config, fusion=fusion))
    with pytest.raises(ValueError, match=f"start patches needs model.fusion modulate, got {fusion}"):
        start_from_patches(model, smooth_images(4, seed=0))


def test_a_width_below_the_latents_is_refused(tiny_config: PAEConfig) -> None:
    model = build_tokenizer(dataclasses.replace(tiny_config, width=4))
    with pytest.raises(ValueError, match="width >= latent_dim = 8, got 4"):
        start_from_patches(model, smooth_images(4, seed=0))


def test_a_run_starts_from_its_own_first_images(packed: PackedImages) -> None:
    """The same config gives the same start; `patches` and `local` differ."""
    run = configs.load(TokenizerRun, "tokenizer/tiny")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, images=packed.shards.folder))
    first, again, local = (
        TokenizerTask(dataclasses.replace(run, start=start)).model.state_dict()
        for start in ("patches", "patches", "local")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.to_pixels.weight"], local["decoder.to_pixels.weight"])
