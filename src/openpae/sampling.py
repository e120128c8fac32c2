"""From noise to latents to images: solvers, guidance with an interval, one seed per sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openpae.dit import LightningDiT
from openpae.flow import euler, guide, time_grid
from openpae.tokenizer import PAE


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn. The defaults are the paper's guided 80-epoch setting."""

    steps: int = 249
    """Euler steps; one generator evaluation each, two where guided."""
    shift: float = 0.4
    """Shift of the time grid: t' = s t / (1 + (s - 1) t)."""
    guidance: float = 2.5
    """w of v_u + w (v_c - v_u); 1 is no guidance."""
    guidance_start: float = 0.25
    """Guide where t >= this; before it the null class is not computed at all."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.shift <= 0:
            raise ValueError(f"shift must be > 0, got {self.shift}")
        if not 0 <= self.guidance_start <= 1:
            raise ValueError(f"guidance_start must lie in [0, 1], got {self.guidance_start}")


def evaluations(config: SamplerConfig) -> int:
    """Generator evaluations per sample (NFE): one a step, two where it is guided."""
    starts = time_grid(config.steps + 1, config.shift)[:-1].float()
    guided = 0 if config.guidance == 1 else int((starts >= config.guidance_start).sum())
    return config.steps + guided


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Noise of the samples with these indices, (B, C, h, w), float32 on the CPU.

    Each sample has a generator of its own, so it is the same in whatever batch and process it is drawn.
    """
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(_mix(seed, index))) for index in indices
    ]
    return torch.stack(noise)


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., K - 1, 0, ... so that every class has count / K samples (up to one): (count,)."""
    return torch.arange(count) % num_classes


@torch.no_grad()
def sample_latents(model: LightningDiT, labels: Tensor, noise: Tensor, config: SamplerConfig) -> Tensor:
    """Follow the velocity from noise to latents, in the tokenizer's scale.

    Args:
        model: the generator, in evaluation mode.
        labels: classes, (B,).
        noise: x_0, (B, C, h, w).
        config: solver and guidance.

    Returns:
        z, (B, C, h, w), as the tokenizer's decoder takes them.

    Raises:
        ValueError: a label that the generator does not know.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= model.null_label:
        raise ValueError(
            f"labels must lie in [0, {model.null_label}] ({model.null_label} is the null class), "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    null = torch.full_like(labels, model.null_label)
    both = torch.cat([labels, null])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if config.guidance == 1 or float(t[0]) < config.guidance_start:
            out: Tensor = model(x, t, labels)
            return out
        conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(conditional, unconditional, config.guidance)

    return model.denormalise(euler(velocity, noise, time_grid(config.steps + 1, config.shift)))


def sample_images(
    tokenizer: PAE,
    generator: LightningDiT,
    labels: Tensor,
    config: SamplerConfig,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> Iterator[Tensor]:
    """Draw images of these classes, batch by batch.

    Args:
        tokenizer: decodes; the one whose latents the generator was trained on.
        generator: makes the latents.
        labels: classes, (n,); sample i has its own noise from (seed, i).
        config: solver and guidance.
        seed: another seed, other samples.
        batch_size: samples at once; it does not change them but for rounding.

    Yields:
        Images in [0, 1], (B, 3, H, W), on the generator's device.
    """
    device = generator.latent_mean.device
    for start in range(0, len(labels), batch_size):
        chosen = labels[start : start + batch_size].to(device)
        noise = initial_noise(seed, range(start, start + len(chosen)), generator.config.latent_shape)
        z = sample_latents(generator, chosen, noise.to(device), config)
        with torch.no_grad():
            yield tokenizer.decode(z).clamp(0, 1).float()


def _mix(seed: int, index: int) -> int:
    """One 63-bit seed of two numbers, so that (0, 1) and (1, 0) differ."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest(), "big")
