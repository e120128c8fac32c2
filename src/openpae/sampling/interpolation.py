"""`pae interpolate`: pictures on the way from one image, or one seed, to another."""

from __future__ import annotations

import torch
from torch import Tensor

from openpae.models.layers import slerp, to_grid, to_tokens
from openpae.models.tokenizer import Autoencoder
from openpae.runtime.draws import initial_noise
from openpae.sampling.guidance import VelocityModel
from openpae.sampling.sampler import Decoder, sample_latents
from openpae.sampling.settings import SamplerConfig


def interpolate_images(
    tokenizer: Autoencoder, first: Tensor, last: Tensor, frames: int, batch_size: int = 16
) -> Tensor:
    """Encode two images, walk from one latent to the other along the sphere, and decode.

    Each token walks on its own sphere (`PAEConfig.sphere` "token") or the whole latent on its one, at even
    angles, so that all latents on the way are ones that an encoder could have made.

    Args:
        tokenizer: in evaluation mode.
        first: image in [0, 1], (3, H, W); its reconstruction is the first frame.
        last: likewise the last.
        frames: how many, the two ends counted.
        batch_size: latents decoded at once.

    Returns:
        Images in [0, 1], (frames, 3, H, W), on the CPU.

    Raises:
        ValueError: fewer than two frames.
    """
    weights = _weights(frames)
    with torch.no_grad():
        a, b = torch.split(tokenizer.encode(torch.stack([first, last]).to(tokenizer.device)), 1)
        path = torch.cat([_between(a, b, t, tokenizer.config.sphere) for t in weights])
    return _decoded(tokenizer, path, batch_size)


def interpolate_seeds(
    tokenizer: Decoder,
    generator: VelocityModel,
    config: SamplerConfig,
    *,
    seeds: tuple[int, int],
    label: int,
    frames: int,
    batch_size: int = 16,
    weak: VelocityModel | None = None,
) -> Tensor:
    """Walk from the noise of one seed to that of another at even angles, and generate an image from each.

    The noise of a frame is normal as the ends are: it is a sum of the two whose squared weights add up to one
    but for the angle between them, which is nearly a right one.

    Args:
        tokenizer: decodes.
        generator: makes the latents, in evaluation mode.
        config: solver and guidance.
        seeds: the ends; they are sample 0 of these seeds.
        label: class of all frames.
        frames: how many, the two ends counted.
        batch_size: frames at once.
        weak: guides in place of the null class.

    Returns:
        Images in [0, 1], (frames, 3, H, W), on the CPU.

    Raises:
        ValueError: fewer than two frames, or solver sde, whose own noise would part neighbouring frames.
    """
    if config.solver == "sde":
        raise ValueError("solver sde adds noise of its own at every step, so frames would jump; take another")
    device, shape = next(generator.parameters()).device, generator.config.latent_shape
    a, b = (initial_noise(seed, [0], shape) for seed in seeds)
    noise = torch.cat([slerp(a, b, t) for t in _weights(frames)]).to(device)
    labels = torch.full((frames,), label, device=device)
    parts = zip(torch.split(noise, batch_size), torch.split(labels, batch_size), strict=True)
    z = torch.cat([sample_latents(generator, y, x, config, weak=weak) for x, y in parts])
    return _decoded(tokenizer, z, batch_size)


def _between(a: Tensor, b: Tensor, t: float, sphere: str) -> Tensor:
    if sphere == "sample":
        return slerp(a, b, t)
    h, w = a.shape[-2:]
    tokens = slerp(to_tokens(a)[0, :, :, None, None], to_tokens(b)[0, :, :, None, None], t)
    return to_grid(tokens[None, :, :, 0, 0], h, w)


def _decoded(tokenizer: Decoder, z: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([tokenizer.decode(x).clamp(0, 1).float().cpu() for x in torch.split(z, batch_size)])


def _weights(frames: int) -> list[float]:
    if frames < 2:
        raise ValueError(f"a walk has at least 2 frames, its ends, got {frames}")
    return [frame / (frames - 1) for frame in range(frames)]
