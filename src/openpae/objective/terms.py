"""The terms of the tokenizer's objective (Eq. 2-6), and the balance of the adversarial loss.

`train.tokenizer` forms their weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.layers import to_grid, to_tokens
from openpae.models.lpips import LPIPS
from openpae.models.upsampling import low_pass_down
from openpae.objective.losses import (
    adaptive_weight,
    compared_pairs,
    consistency,
    denoising_loss,
    gram_alignment,
    kl_penalty,
    semantic_alignment,
)
from openpae.objective.rivals import mixture_consistency
from openpae.objective.settings import TokenizerLoss
from openpae.runtime import processes
from openpae.runtime.draws import Draws

BALANCED = ("l1", "lpips", "mcr", "mix", "gan")
"""The terms of the decodes, which `balance_gan` adds."""


def latent_noise(draws: Draws, strength: float, shape: Sequence[int]) -> Tensor | None:
    """Noise for the latents of a device batch, (B, *shape): n = s e, s uniform in [0, strength], e normal.

    Noise-augmented decoding of RAE (Sec. 4.3 of arXiv:2510.11690), as generated latents are noisy.

    Args:
        draws: of the device batch.
        strength: largest root mean square; 0 returns None.
        shape: (C, h, w).
    """
    if not strength:
        return None
    level = strength * draws.uniform("latent noise level", *[1] * len(shape))
    return level * draws.normal("latent noise", *shape)


def image_terms(
    x: Tensor,
    decoded: Mapping[str, Tensor],
    lpips: LPIPS | None,
    loss: TokenizerLoss,
    shift: Sequence[int] = (0, 0),
    mixed: Tensor | None = None,
) -> dict[str, Tensor]:
    """L1, LPIPS, MCR and mix. Each image passes the perceptual network once, all decodes in one batch.

    Args:
        x: images in [0, 1], (B, 3, H, W).
        decoded: decodes r of x, m and l if MCR's design compares them, and "mix" of mixtures, (B or fewer, 3,
            H, W).
        lpips: the perceptual network, or None if no term needs it.
        loss: weights and designs of the terms.
        shift: pixels by which LPIPS shifts all images to the right and down, with repeated borders.
        mixed: shares of the next image in the mixtures, one for each.

    Returns:
        Scalars by symbol.
    """
    terms = {"l1": F.l1_loss(decoded["r"], x)}
    if lpips is None:
        return terms
    count = math.ceil(loss.lpips_share * len(x))
    shown = {name: images[:count] for name, images in decoded.items()}
    sizes = [len(images) for images in shown.values()]
    maps = [
        torch.split(stage, sizes)
        for stage in lpips.features(_shifted(torch.cat(list(shown.values())), shift))
    ]
    perceived = {name: [stage[i] for stage in maps] for i, name in enumerate(shown)}
    if loss.lpips:
        with torch.no_grad():
            target = lpips.features(_shifted(x[:count], shift))
        terms["lpips"] = lpips.distance(perceived["r"], target).mean()
    if mixed is not None:
        parents = [stage[: len(mixed)] for stage in perceived["r"]]
        terms["mix"] = mixture_consistency(
            decoded["mix"], decoded["r"][: len(mixed)], mixed, perceived["mix"], parents, lpips.distance
        )
    if len(decoded) > (1 if mixed is None else 2):
        distances = []
        for a, b in compared_pairs(loss.mcr_design):
            nearer = [stage[: len(shown[a])] for stage in perceived[b]]
            pixels = decoded[b][: len(decoded[a])]
            distances.append(consistency(decoded[a], pixels, perceived[a], nearer, lpips.distance))
        terms["mcr"] = torch.stack(distances).sum()
    return terms


def _shifted(images: Tensor, shift: Sequence[int]) -> Tensor:
    """Images (B, 3, H, W) with their first column and row repeated `shift` times: (B, 3, H + y, W + x)."""
    x, y = shift
    return F.pad(images, (x, 0, y, 0), mode="replicate") if x or y else images


def prior_terms(z: Tensor, target: Tensor, loss: TokenizerLoss) -> dict[str, Tensor]:
    """SSR and SCR of latents (B, C, h, w) against refined targets (B, N, C): scalars by symbol."""
    terms = {}
    if loss.ssr:
        structure = target
        if loss.ssr_low_pass is not None:
            h, w = z.shape[-2:]
            structure = to_tokens(low_pass_down(to_grid(target, h, w), h, w, loss.ssr_low_pass))
        terms["ssr"] = gram_alignment(to_tokens(z), structure, loss.ssr_gram)
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
    """Gradient norm of each weighted term at the latent, over all ranks, divided by the sum of the norms."""
    norms = {
        name: processes.norm_of(
            torch.linalg.vector_norm(torch.autograd.grad(weights[name] * term, z, retain_graph=True)[0])
        )
        for name, term in terms.items()
    }
    total = torch.stack(list(norms.values())).sum()
    return {f"gradient_share_{name}": norm / total for name, norm in norms.items()}


class _KnownGradient(torch.autograd.Function):
    """A scalar with given gradients for its inputs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(scale * gradient for gradient in ctx.saved_tensors)


def balance_gan(
    terms: Mapping[str, Tensor],
    weights: Mapping[str, float | Tensor],
    decoded: Mapping[str, Tensor],
    last: Tensor,
    *,
    keep_graph: bool,
) -> tuple[Tensor, Tensor]:
    """The terms of the decodes (L1, LPIPS, MCR and GAN), GAN with the adaptive weight of VQGAN.

    Perceptual network and discriminator run backward once: their gradients at the decodes are propagated to
    the decoder's last layer for the norms, then weighted, added and reused for the step. MCR has no gradient
    at the reconstruction r, its anchor, so the gradient at r is that of L1 and LPIPS.

    Args:
        terms: scalars by symbol.
        weights: of the terms.
        decoded: the decodes, r among them.
        last: W, weight of the decoder's last layer.
        keep_graph: keep the graph of the terms for another backward pass.

    Returns:
        The weight of GAN, and the weighted sum of these terms, with known gradients at the decodes.
    """
    names = [name for name in BALANCED if name in terms and name != "gan"]
    reconstruction = torch.stack([weights[name] * terms[name] for name in names]).sum()
    gradients = [*torch.autograd.grad(reconstruction, list(decoded.values()), retain_graph=keep_graph)]
    (adversarial,) = torch.autograd.grad(terms["gan"], decoded["r"], retain_graph=keep_graph)
    r = list(decoded).index("r")
    at_last = [
        processes.mean_of(torch.autograd.grad(decoded["r"], last, gradient, retain_graph=True)[0])
        for gradient in (gradients[r], adversarial)  # one weight for all ranks
    ]
    weight = weights["gan"] * adaptive_weight(at_last[0], at_last[1])
    gradients[r] = gradients[r] + weight * adversarial
    value = (reconstruction + weight * terms["gan"]).detach()
    loss: Tensor = _KnownGradient.apply(value, gradients, *decoded.values())  # type: ignore[no-untyped-call]
    return weight, loss
