"""What the quickstart made, held against what costs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from openpae.data.images import PackedImages, spread
from openpae.data.pixels import quantize
from openpae.eval.estimate import mean_of
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import frechet_distance
from openpae.eval.reference import Reference
from openpae.models.tokenizer import Autoencoder
from openpae.objective.losses import perturb


def patch_colours(images: Tensor, patch: int) -> Tensor:
    """Images (B, 3, H, W) in which every patch shows its mean colour: what a tokenizer must beat."""
    return F.interpolate(F.avg_pool2d(images, patch), scale_factor=patch, mode="nearest")


def free_psnr(images: PackedImages, patch: int) -> float:
    """Mean PSNR in dB of `patch_colours` over all images, as `pae evaluate` measures reconstructions."""
    values = []
    for start in range(0, len(images), 64):
        x = images.shards.gather(torch.arange(start, min(start + 64, len(images))).numpy()).float() / 255
        error = (quantize(patch_colours(x, patch)).float() / 255 - x).square().mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(error.clamp(min=1e-10)))
    return mean_of("psnr", torch.cat(values), {}).value


def free_frechet(images: Tensor, features: FeatureSet, reference: Reference) -> float:
    """Frechet distance to the reference of a generator that repeats the mean of images (n, 3, H, W).

    Args:
        images: real ones, in [0, 1].
        features: an empty set, of the reference's extractor.
        reference: what samples are compared with.
    """
    features.update(images.mean(dim=0, keepdim=True).repeat(2, 1, 1, 1))
    return frechet_distance(features.pooled.gaussian(), reference.pooled)


@torch.no_grad()
def recognised(
    tokenizer: Autoencoder,
    pictures: PackedImages,
    angles: Sequence[float],
    *,
    each: int = 2,
    queries: int = 48,
) -> dict[str, Any]:
    """How many decodes still are the same emoji, of latents as they are and of moved ones.

    A decode is recognised where its nearest neighbour among all pictures is the one that it was made from:
    by the cosine of the VFM's pooled, centred features.

    Args:
        tokenizer: with its encoder.
        pictures: held-out emoji, `each` pictures of an emoji in a row; the first of each takes part.
        angles: moves of the latent along one random direction, in degrees.
        each: pictures of an emoji.
        queries: emoji that are decoded.

    Returns:
        shares: angle as text -> share recognised, "0" for the plain reconstruction; and how many of what.
    """
    rows = np.arange(0, len(pictures), each)
    chosen = spread(len(rows), min(queries, len(rows)))
    x = pictures.shards.gather(rows).float() / 255
    known = _pooled(tokenizer, x)
    centre = known.mean(dim=0)
    z = tokenizer.encode(x[chosen])
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    shares = {}
    for angle in (0.0, *angles):
        moved = perturb(z, direction, angle, tokenizer.config.sphere) if angle else z
        seen = F.normalize(_pooled(tokenizer, tokenizer.decode(moved).clamp(0, 1)) - centre, dim=1)
        nearest = (seen @ F.normalize(known - centre, dim=1).T).argmax(dim=1)
        shares[f"{angle:g}"] = float((nearest == torch.from_numpy(chosen)).float().mean())
    return {"shares": shares, "decodes": len(chosen), "among": len(rows)}


def _pooled(tokenizer: Autoencoder, images: Tensor) -> Tensor:
    return torch.cat([tokenizer.features(part).float().mean(dim=1) for part in torch.split(images, 64)])


def problems(record: Mapping[str, Any]) -> list[str]:
    """Why a result is of no use; empty where it beats what costs nothing.

    Args:
        record: evaluation.json, with `free` as `free_psnr` and `free_frechet` give it.
    """
    found, free = [], record["free"]
    psnr = record["reconstruction"]["metrics"]["psnr"]["value"]
    if not psnr > free["psnr"]:
        found.append(
            f"the reconstructions are at {psnr:.1f} dB, and the mean colour of each patch alone gives "
            f"{free['psnr']:.1f} dB"
        )
    frechet = record["samples"]["metrics"]["frechet"]["value"]
    if not frechet < free["frechet"]:
        found.append(
            f"the samples are at a Frechet distance of {frechet:.0f}, and the mean picture, repeated, is at "
            f"{free['frechet']:.0f}"
        )
    return found


def advice(found: list[str], budget: float) -> str:
    """The first line of a result that is of no use: that it is, why, and what to do."""
    minutes = max(3, math.ceil(2 * budget / 60))
    return (
        f"not usable: {'; '.join(found)}. The time was too short for this machine as busy as it was: name a "
        f"new --out and take --budget {minutes}min, or see what is possible with --pretrained"
    )
