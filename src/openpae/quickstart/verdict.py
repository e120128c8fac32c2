"""Compare the result of a quickstart with trivial baselines, which need no training."""

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
    """Replace each patch of images (B, 3, H, W) by its mean colour: the baseline of reconstructions."""
    return F.interpolate(F.avg_pool2d(images, patch), scale_factor=patch, mode="nearest")


def baseline_psnr(images: PackedImages, patch: int) -> float:
    """Return the mean PSNR in dB of `patch_colours`, computed as in `pae evaluate`."""
    values = []
    for start in range(0, len(images), 64):
        x = images.shards.gather(torch.arange(start, min(start + 64, len(images))).numpy()).float() / 255
        error = (quantize(patch_colours(x, patch)).float() / 255 - x).square().mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(error.clamp(min=1e-10)))
    return mean_of("psnr", torch.cat(values), {}).value


def baseline_frechet(images: Tensor, features: FeatureSet, reference: Reference) -> float:
    """Return the Frechet distance of the mean image, repeated: the baseline of samples.

    Args:
        images: real images, (n, 3, H, W) in [0, 1].
        features: an empty set, with the reference's extractor.
        reference: the reference of the samples.
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
    """Measure which share of decoded images is recognised, for exact latents and for rotated ones.

    An image is recognised if its nearest neighbour among all pictures is its original, by the cosine of the
    VFM's pooled, centred features.

    Args:
        tokenizer: a tokenizer with its encoder.
        pictures: held-out emoji, `each` consecutive pictures per emoji; the first of each is used.
        angles: rotations of the latent along one random direction, in degrees.
        each: pictures per emoji.
        queries: number of emoji to decode.

    Returns:
        shares: angle as text -> share recognised, "0" for the reconstruction; decodes: number of decoded
        emoji; among: number of candidates.
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
    """Return the reasons why a result is not usable; empty if it beats both baselines.

    Args:
        record: content of evaluation.json; `free` holds the baselines.
    """
    reasons, free = [], record["free"]
    psnr = record["reconstruction"]["metrics"]["psnr"]["value"]
    if not psnr > free["psnr"]:
        reasons.append(
            f"the reconstructions are at {psnr:.1f} dB, and the mean colour of each patch alone gives "
            f"{free['psnr']:.1f} dB"
        )
    frechet = record["samples"]["metrics"]["frechet"]["value"]
    if not frechet < free["frechet"]:
        reasons.append(
            f"the samples are at a Frechet distance of {frechet:.0f}, and the mean picture, repeated, is at "
            f"{free['frechet']:.0f}"
        )
    return reasons


def advice(reasons: list[str], budget: float) -> str:
    """Return one line for a result that is not usable: the reasons, and what to do."""
    minutes = max(3, math.ceil(2 * budget / 60))
    return (
        f"not usable: {'; '.join(reasons)}. The time was too short for this machine and its load: name a new "
        f"--out and give --budget {minutes}min, or try --pretrained"
    )
