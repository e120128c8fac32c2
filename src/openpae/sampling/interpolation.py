"""`pae interpolate`: images between two images, or between two seeds."""

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
    """Encode two images, interpolate their latents along the sphere, and decode.

    Steps have equal angles. Each token moves on its own sphere (`PAEConfig.sphere` is "token"), or the full
    latent on one sphere ("sample"). So all latents between stay on the sphere of the encoder.

    Args:
        tokenizer: in evaluation mode.
        first: image in [0, 1], (3, H, W); its reconstruction is the first frame.
        last: image in [0, 1], (3, H, W); its reconstruction is the last frame.
        frames: number of images, with the two ends.
        batch_size: latents per call of the decoder.

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
    """Interpolate the noise of two seeds at equal angles, and generate an image from each.

    The two noises are nearly orthogonal. So the squared weights of each sum add up to nearly one, and the
    noise of every frame is close to standard normal.

    Args:
        tokenizer: decodes.
        generator: makes the latents, in evaluation mode.
        config: solver and guidance.
        seeds: the ends are sample 0 of these seeds.
        label: class of all frames.
        frames: number of images, with the two ends.
        batch_size: frames per batch.
        weak: guides in place of the null class.

    Returns:
        Images in [0, 1], (frames, 3, H, W), on the CPU.

    Raises:
        ValueError: fewer than two frames; or solver sde, whose noise at every step differs between frames.
    """
    if config.solver == "sde":
        raise ValueError("solver sde adds noise at every step, so frames would jump; take another solver")
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
        raise ValueError(f"frames must be at least 2, the two ends, got {frames}")
    return [frame / (frames - 1) for frame in range(frames)]
