"""Interpolation: its ends are the given images or samples, and its steps have equal angles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openpae.models.dit import LightningDiT
from openpae.models.tokenizer import PAE
from openpae.runtime.draws import initial_noise
from openpae.sampling.interpolation import interpolate_images, interpolate_seeds
from openpae.sampling.sampler import sample_latents
from openpae.sampling.settings import SamplerConfig


def watched(tokenizer: PAE, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the latents that the tokenizer decodes."""
    seen: list[Tensor] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda z: seen.append(z) or decode(z))
    return seen


@pytest.mark.parametrize("frames", [2, 5])
def test_images_are_interpolated_between_their_reconstructions(tiny_pae: PAE, frames: int) -> None:
    first, last = torch.rand(2, 3, 32, 32)
    images = interpolate_images(tiny_pae, first, last, frames, batch_size=2)
    assert images.shape == (frames, 3, 32, 32)
    with torch.no_grad():
        ends = tiny_pae.reconstruct(torch.stack([first, last]))
    torch.testing.assert_close(images[[0, -1]], ends, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sphere", ["token", "sample"])
def test_latents_stay_on_the_sphere_at_equal_angles(
    tiny_pae: PAE, monkeypatch: pytest.MonkeyPatch, sphere: str
) -> None:
    object.__setattr__(
        tiny_pae, "config", tiny_pae.config.__class__(**{**vars(tiny_pae.config), "sphere": sphere})
    )
    seen = watched(tiny_pae, monkeypatch)
    interpolate_images(tiny_pae, *torch.rand(2, 3, 32, 32), frames=5)
    z = torch.cat(seen).double()  # (5, 8, 4, 4)
    rows = z.flatten(2).mT.flatten(0, 1) if sphere == "token" else z.flatten(1)
    torch.testing.assert_close(rows.square().mean(dim=1), torch.ones(len(rows)).double(), atol=1e-4, rtol=0)
    rows = rows.view(5, -1, rows.shape[1])  # frame, sphere, its dimensions
    cosines = torch.nn.functional.cosine_similarity(rows[:-1], rows[1:], dim=2).clamp(-1, 1)
    angles = cosines.acos()
    torch.testing.assert_close(angles, angles.mean(dim=0).expand_as(angles), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("solver", ["euler", "multistep"])
def test_seeds_are_interpolated_between_their_samples(
    tiny_pae: PAE, tiny_dit: LightningDiT, solver: Any
) -> None:
    config = SamplerConfig(solver=solver, steps=4, guidance=2.0)
    images = interpolate_seeds(tiny_pae, tiny_dit, config, seeds=(3, 8), label=1, frames=4, batch_size=3)
    assert images.shape == (4, 3, 32, 32)
    noise = torch.cat([initial_noise(seed, [0], (8, 4, 4)) for seed in (3, 8)])
    with torch.no_grad():
        ends = tiny_pae.decode(sample_latents(tiny_dit, torch.tensor([1, 1]), noise, config)).clamp(0, 1)
    torch.testing.assert_close(images[[0, -1]], ends, atol=1e-4, rtol=1e-4)
    assert (images[1] - images[2]).abs().max() > 1e-4


def test_interpolated_noise_keeps_its_length(
    tiny_pae: PAE, tiny_dit: LightningDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator with zero velocity returns the noise. Its length must not shrink between the ends."""
    torch.nn.init.zeros_(tiny_dit.to_velocity.weight)
    torch.nn.init.zeros_(tiny_dit.to_velocity.bias)
    seen = watched(tiny_pae, monkeypatch)
    config = SamplerConfig(steps=1, guidance=1.0)
    interpolate_seeds(tiny_pae, tiny_dit, config, seeds=(0, 1), label=0, frames=5)
    lengths = torch.cat(seen).flatten(1).norm(dim=1)
    assert lengths.min() > 0.9 * lengths[[0, -1]].min()
    assert lengths.mean() == pytest.approx(math.sqrt(128), rel=0.15)


def test_one_frame_and_the_sde_are_refused(tiny_pae: PAE, tiny_dit: LightningDiT) -> None:
    with pytest.raises(ValueError, match="frames must be at least 2, the two ends, got 1"):
        interpolate_images(tiny_pae, *torch.rand(2, 3, 32, 32), frames=1)
    with pytest.raises(ValueError, match="frames would jump"):
        interpolate_seeds(tiny_pae, tiny_dit, SamplerConfig(solver="sde"), seeds=(0, 1), label=0, frames=3)
