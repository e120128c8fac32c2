"""Interpolated Frechet distance: do images between two neighbouring latents look real? (arXiv:2603.05630)

Its authors report that it predicts gFID better than rFID, the distance of reconstructions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from openpae.eval.estimate import Estimate
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import frechet_distance
from openpae.geometry.metrics import Decode
from openpae.models.layers import slerp


def interpolated_frechet(
    latents: Tensor,
    decode: Decode,
    real: FeatureSet,
    *,
    pool: Tensor | None = None,
    candidates: int = 1,
    batch_size: int = 32,
    seed: int = 0,
) -> Estimate:
    """Frechet distance of images decoded half way between neighbouring latents to real images (iFID, iFD).

        FD({D(slerp(z_i, z_nn(i), 1/2))}, {x_i}),   nn(i) = the nearest other latent by cosine

    Published iFID takes 50,000 validation images of ImageNet, neighbours among the training images, and
    Inception features. The authors' script draws one of 10 neighbours: `candidates=10`.

    Args:
        latents: (B, C, h, w), B > 1.
        decode: the tokenizer's decoder.
        real: features of the images x of these latents; its extractor also takes the decoded images.
        pool: latents that can be neighbours, (M, C, h, w); None takes the other `latents`.
        candidates: see `latent_partners`.
        batch_size: latents per call of the decoder.
        seed: seed of the draw among candidates.

    Returns:
        The distance; lower is better. It falls with the number of images.

    Raises:
        ValueError: see `latent_partners`.
    """
    partners = latent_partners(latents, pool=pool, candidates=candidates, seed=seed)
    others = latents if pool is None else pool
    between = FeatureSet(real.extractor)
    with torch.no_grad():
        for start in range(0, len(latents), batch_size):
            rows = slice(start, start + batch_size)
            between.update(decode(slerp(latents[rows], others[partners[rows]], 0.5)).cpu())
    return Estimate(
        name="interpolated_frechet",
        value=frechet_distance(between.pooled.gaussian(), real.pooled.gaussian()),
        n=between.n,
        settings={
            "extractor": real.extractor.name,
            "reference": real.n,
            "pool": len(others),
            "candidates": candidates,
            "seed": seed,
        },
    )


def latent_partners(
    latents: Tensor, *, pool: Tensor | None = None, candidates: int = 1, seed: int = 0, block: int = 512
) -> Tensor:
    """A near neighbour of each latent by the cosine of flattened latents: (B,) int64, rows of the pool.

    Args:
        latents: (B, C, h, w).
        pool: latents that can be neighbours, (M, C, h, w); None takes the other `latents`.
        candidates: 1 takes the nearest latent. Above 1, image i draws one of its nearest latents z_k with
            probability softmax(-mean (z - z_k)^2). The draw depends on the seed and i alone.
        seed: seed of the draw.
        block: rows per block of similarities.

    Raises:
        ValueError: the pool holds fewer latents than candidates, or latents of another shape.
    """
    others = latents if pool is None else pool
    available = len(others) - (pool is None)
    if others.shape[1:] != latents.shape[1:]:
        raise ValueError(
            f"the pool must hold latents {tuple(latents.shape[1:])}, got {tuple(others.shape[1:])}"
        )
    if not 1 <= candidates <= available:
        raise ValueError(
            f"candidates must be between 1 and the {available} latents of the pool, got {candidates}"
        )
    x, y = F.normalize(latents.flatten(1).float(), dim=1), F.normalize(others.flatten(1).float(), dim=1)
    partners = torch.empty(len(latents), dtype=torch.int64)
    for start in range(0, len(latents), block):
        similarity = x[start : start + block] @ y.T
        if pool is None:
            similarity.diagonal(start).fill_(-torch.inf)  # row r is latent start + r itself
        nearest = similarity.topk(candidates, dim=1).indices
        for row, choice in enumerate(nearest, start):
            partners[row] = choice[_draw(latents[row], others[choice], seed, row)]
    return partners


def _draw(latent: Tensor, choices: Tensor, seed: int, image: int) -> int:
    if len(choices) == 1:
        return 0
    p = torch.softmax(-(latent - choices).double().square().mean(dim=(1, 2, 3)), dim=0).cpu().numpy()
    return int(np.random.default_rng([seed, image]).choice(len(choices), p=p / p.sum()))
