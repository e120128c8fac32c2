"""Losses of the nearest rivals, for ablations: decodes of mixtures, and alignment with the VFM's features.

What we know of each, and how surely, is in docs/deviations.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from openpae.models.layers import to_sphere
from openpae.models.upsampling import full_precision
from openpae.objective.losses import Distance


def mixtures(z: Tensor, share: Tensor, per: str = "token") -> Tensor:
    """Mix each latent with that of the next image; the last one with the first.

        z_mix = sphere((1 - a) z_i + a z_(i + 1))

    Args:
        z: latents on the sphere, (B, C, h, w). Gradients flow to these.
        share: a in [0, 1], (B,).
        per: axes of the mean square in the sphere norm, see `to_sphere`.

    Returns:
        (B, C, h, w), on the sphere, float32.
    """
    z, a = z.float(), share.view(-1, 1, 1, 1).to(z.device)
    return to_sphere((1 - a) * z + a * z.roll(-1, dims=0), per)


def mixture_consistency(
    mixed: Tensor,
    parents: Tensor,
    share: Tensor,
    mixed_features: Sequence[Tensor],
    parent_features: Sequence[Tensor],
    distance: Distance,
) -> Tensor:
    """Pull the decode of a mixture to the decodes of both images, as MCR pulls to the anchor.

        L = mean_i (1 - a) d(x_mix, sg x_i) + a d(x_mix, sg x_(i + 1)),   d = L1 + LPIPS

    Args:
        mixed: decodes of `mixtures`, (B, 3, H, W). Gradients flow to these.
        parents: decodes x of the latents themselves, (B, 3, H, W). Treated as constants.
        share: a, (B,).
        mixed_features: perceptual features of the mixtures, one map per stage. Gradients flow to these.
        parent_features: perceptual features of the parents. Treated as constants.
        distance: (features, features) -> (B,), such as `LPIPS.distance`.

    Returns:
        Scalar >= 0; 0 where all decodes agree.
    """
    a = share.to(mixed.device)
    total = mixed.new_zeros(len(mixed), dtype=torch.float32)
    for weight, shift in ((1 - a, 0), (a, -1)):
        pixels = (mixed.float() - parents.detach().float().roll(shift, dims=0)).abs().mean(dim=(1, 2, 3))
        constant = [feature.detach().roll(shift, dims=0) for feature in parent_features]
        total = total + weight * (pixels + distance(mixed_features, constant).float())
    return total.mean()


def vfm_alignment(
    latent: Tensor,
    features: Tensor,
    project: Callable[[Tensor], Tensor],
    margins: tuple[float, float] = (0.5, 0.25),
) -> Tensor:
    """Alignment of the latent with a VFM's features (VA-VAE, arXiv:2501.01423).

        L = mean_i relu(1 - m1 - cos(W z_i, f_i)) + mean_ij relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2)

    Args:
        latent: latent tokens z, (B, N, C). Gradients flow to these.
        features: f = H_vfm on the same grid, (B, N, D). Treated as constants.
        project: W, a learnt linear map C -> D. Gradients flow to its weights.
        margins: m1 of the cosines and m2 of their matrix.

    Returns:
        Scalar in [0, 4]; 0 where each cosine is within its margin.

    Raises:
        ValueError: the two do not hold the same tokens.
    """
    if latent.shape[:2] != features.shape[:2]:
        raise ValueError(
            f"latent and features must hold the same tokens, got (B, N) = {tuple(latent.shape[:2])} and "
            f"{tuple(features.shape[:2])}"
        )
    z, f = latent.float(), F.normalize(features.detach().float(), dim=-1)
    with full_precision(z):
        single = F.relu(1 - margins[0] - F.cosine_similarity(project(z).float(), f, dim=-1)).mean()
        unit = F.normalize(z, dim=-1)
        gap = (unit @ unit.mT - f @ f.mT).abs()
        return single + F.relu(gap - margins[1]).mean()
