"""Geometry of a latent space: SSC, LPC, GSQ and effective rank (Eq. 7-14 of arXiv:2605.07915).

Every function takes tensors, so that any tokenizer can be measured: latents (B, C, h, w), label maps
(B, H, W) or class labels (B,), and two callables for LPC. `geometry/__init__` says where a new metric is
registered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from openpae.eval.estimate import Estimate, Settings, jackknife_error, mean_of
from openpae.eval.reconstruction import ImageDistance
from openpae.geometry.clusters import spectral_clusters
from openpae.runtime.extras import needs

Decode = Callable[[Tensor], Tensor]
"""Latents (B, C, h, w) to images (B, 3, H, W) in [0, 1]."""

RADII = (0.1, 0.5, 1.0, 2.0)
"""rho of Eq. 10: length of a perturbation divided by the norm of the latent."""


def spatial_structure_consistency(
    latents: Tensor, labels: Tensor, *, sigma: float = 0.1, ignore: int | None = None, seed: int = 0
) -> Estimate:
    """Agreement of token clusters with image segments (SSC, Eq. 7-8 of arXiv:2605.07915). Higher is better.

        mean over images of NMI(clusters of the tokens, segments on the latent grid)

    NMI is normalised by the geometric mean. Each cell of the grid takes the label of most of its pixels. The
    number of clusters is the number of segments on the grid. Images with fewer than two are dropped.

    Args:
        latents: (B, C, h, w).
        labels: segments of the same images, panoptic or semantic, (B, H, W) int; H and W are multiples of h
            and w.
        sigma: temperature of the affinity (`spectral_clusters`).
        ignore: label of pixels that do not count, such as "void"; None counts all.
        seed: seed of k-means.

    Returns:
        Mean in [0, 1] with its standard error over images; settings hold the number of dropped images.

    Raises:
        ValueError: the shapes do not fit, latents are not finite, or no image has two segments.
    """
    with needs("eval", "SSC"):
        from sklearn.metrics import normalized_mutual_info_score
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    check_latents(latents)
    if labels.ndim != 3 or len(labels) != len(latents):
        raise ValueError(
            f"labels must be one map (H, W) for each of the {len(latents)} images, got {tuple(labels.shape)}"
        )
    values, dropped = [], 0
    # Matrices of 256 x 256 are too small for threads: on 2 busy cores threads were 40 times slower.
    with threadpool_limits(limits=1):
        segments = majority_labels(labels, *latents.shape[-2:], ignore=ignore).flatten(1).numpy()
        for latent, segment in zip(latents, segments, strict=True):
            counted = np.ones(len(segment), bool) if ignore is None else segment != ignore
            k = len(np.unique(segment[counted]))
            if k < 2:
                dropped += 1
                continue
            clusters = spectral_clusters(latent, k, sigma=sigma, seed=seed).flatten().numpy()
            values.append(
                normalized_mutual_info_score(segment[counted], clusters[counted], average_method="geometric")
            )
    if not values:
        raise ValueError(
            f"SSC needs an image with at least two segments on its grid, got none in {len(labels)}"
        )
    settings: Settings = {
        "sigma": sigma,
        "ignore": "none" if ignore is None else ignore,
        "dropped": dropped,
        "seed": seed,
    }
    return mean_of("ssc", torch.tensor(values, dtype=torch.float64), settings)


def majority_labels(labels: Tensor, h: int, w: int, *, ignore: int | None = None) -> Tensor:
    """Bring label maps to a grid: each cell takes its most frequent label, on a tie the smallest.

    Args:
        labels: (B, H, W) int.
        h: rows of the grid; divides H.
        w: columns of the grid; divides W.
        ignore: label of pixels that do not count; a cell keeps it only if it has no other label.

    Returns:
        (B, h, w) int64 on the CPU.

    Raises:
        ValueError: not integer maps, or not a multiple of the grid.
    """
    if labels.ndim != 3 or labels.is_floating_point():
        raise ValueError(f"label maps must be integers (B, H, W), got {labels.dtype} {tuple(labels.shape)}")
    if labels.shape[1] % h or labels.shape[2] % w:
        raise ValueError(
            f"label maps must be a multiple of the {h} x {w} latent grid, got {labels.shape[1]} x "
            f"{labels.shape[2]}; resize them (nearest neighbour) with their images"
        )
    rows, columns = labels.shape[1] // h, labels.shape[2] // w
    cells = labels.cpu().long().view(-1, h, rows, w, columns).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    return torch.stack([_majority(image, ignore) for image in cells]).view(-1, h, w)


def _majority(cells: Tensor, ignore: int | None) -> Tensor:
    """Most frequent label of each row of (h w, pixels)."""
    names, numbers = torch.unique(cells, return_inverse=True)
    counts = torch.zeros(len(cells), len(names), dtype=torch.long)
    counts.scatter_add_(1, numbers, torch.ones_like(numbers))
    if ignore is not None:
        ignored = names == ignore
        empty = counts[:, ~ignored].sum(dim=1, keepdim=True) == 0
        counts[:, ignored] = empty.long()
    winners: Tensor = names[counts.argmax(dim=1)]
    return winners


def latent_perturbation_consistency(
    latents: Tensor,
    decode: Decode | None,
    lpips: ImageDistance,
    *,
    directions: int = 1,
    radii: Sequence[float] = RADII,
    batch_size: int = 32,
    seed: int = 0,
) -> Estimate:
    """Change of the image under moves of its latent (LPC, Eq. 9-10 of arXiv:2605.07915). Lower is better.

        sum_rho w_rho mean_{z, u} (LPIPS(D(z + eps u), D(z)) + LPIPS(D(z - eps u), D(z))) / 2,
        eps = rho |z|_2,   w_rho = rho^-1 / sum rho^-1

    u is uniform on the unit sphere of the full flattened latent. Moved latents are not projected back to the
    sphere of the tokenizer. All radii share a direction. It depends on the seed and the image number alone.

    Args:
        latents: (B, C, h, w).
        decode: the tokenizer's decoder; None raises.
        lpips: distance of two batches of images, (B,).
        directions: unit directions u per image. More images lower the standard error more than more
            directions.
        radii: rho.
        batch_size: latents per call of the decoder.
        seed: seed of the directions.

    Returns:
        Mean >= 0 with its standard error over images.

    Raises:
        ValueError: there is no decoder, latents are not finite, or a setting is out of range.
    """
    if decode is None:
        raise ValueError("LPC is not defined without a decoder: it compares decoded images; leave it out")
    check_latents(latents)
    if directions < 1 or batch_size < 1:
        raise ValueError(f"directions and batch_size must be at least 1, got {directions} and {batch_size}")
    if not radii or min(radii) <= 0:
        raise ValueError(f"radii must be positive, got {', '.join(map(str, radii)) or 'none'}")
    inverse = torch.tensor([1 / rho for rho in radii], dtype=torch.float64)
    weights = (inverse / inverse.sum()).repeat_interleave(2).repeat(directions) / (2 * directions)  # per move
    together = max(1, batch_size // (1 + len(weights)))  # images per batch, each with its moves
    values = []
    with torch.no_grad():
        for start in range(0, len(latents), together):
            moves = []
            for i, z in enumerate(latents[start : start + together], start):
                u = unit_directions(z, directions, seed=seed, image=i)
                moves.append(torch.cat([z[None], *(moved_latents(z, one, radii) for one in u)]))
            images = torch.cat([decode(part) for part in torch.split(torch.cat(moves), batch_size)])
            images = images.view(len(moves), -1, *images.shape[1:])  # (b, 1 + moves, 3, H, W), anchor first
            moved = images[:, 1:].flatten(0, 1)
            anchors = images[:, :1].expand_as(images[:, 1:]).flatten(0, 1)
            pairs = zip(torch.split(moved, batch_size), torch.split(anchors, batch_size), strict=True)
            distances = torch.cat([lpips(x, anchor).double().cpu() for x, anchor in pairs])
            values.append(distances.view(len(moves), -1) @ weights)
    settings: Settings = {"directions": directions, "radii": " ".join(map(str, radii)), "seed": seed}
    return mean_of("lpc", torch.cat(values), settings)


def unit_directions(latent: Tensor, count: int, *, seed: int = 0, image: int = 0) -> Tensor:
    """Uniform directions on the unit sphere of a flattened latent: (count, C, h, w).

    Args:
        latent: (C, h, w); gives shape, type and device.
        count: number of directions.
        seed: seed; a direction depends on (seed, image) alone.
        image: number of the image.
    """
    u = torch.from_numpy(np.random.default_rng([seed, image]).standard_normal((count, *latent.shape)))
    unit: Tensor = u / torch.linalg.vector_norm(u, dim=(1, 2, 3), keepdim=True)
    return unit.to(latent)


def moved_latents(latent: Tensor, direction: Tensor, radii: Sequence[float] = RADII) -> Tensor:
    """z + eps u and z - eps u for each radius, eps = rho |z|_2 (Eq. 10): (2 R, C, h, w), pair by pair.

    Args:
        latent: z, (C, h, w).
        direction: u, (C, h, w), of unit norm.
        radii: R values of rho.
    """
    steps = torch.tensor([sign * rho for rho in radii for sign in (1, -1)]).to(latent)
    moved: Tensor = latent + steps.view(-1, 1, 1, 1) * torch.linalg.vector_norm(latent) * direction
    return moved


def global_semantic_quality(
    latents: Tensor, labels: Tensor, *, classes: int = 100, repeats: int = 5, seed: int = 0
) -> Estimate:
    """Share of images whose nearest image has their class (GSQ, Eq. 11-14 of arXiv:2605.07915).

        nearest by the cosine of x = pool(z) - mean pool(z);   higher is better

    Each repeat draws classes and centres on their images. If there are no more than `classes` classes, one
    repeat takes all: the standard error is then over images, otherwise over repeats.

    Args:
        latents: (B, C, h, w), or pooled already, (B, C).
        labels: class of each image, (B,) int.
        classes: classes per repeat.
        repeats: number of draws.
        seed: seed of the draws.

    Returns:
        Mean in [0, 1]; settings hold the number of classes.

    Raises:
        ValueError: the shapes do not fit, latents are not finite, or there is only one class.
    """
    pooled = _pool(latents)
    if labels.shape != pooled.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be one class number for each of the {len(pooled)} latents, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    names, counts = torch.unique(labels.cpu(), return_counts=True)
    if len(names) < 2:
        raise ValueError(f"GSQ needs images of at least two classes, got {len(names)}")
    if alone := int((counts == 1).sum()):
        warnings.warn(
            f"{alone} of {len(names)} classes hold one image, which cannot have a neighbour of its class",
            stacklevel=2,
        )
    settings: Settings = {
        "classes": min(classes, len(names)),
        "known_classes": len(names),
        "images": len(pooled),
        "seed": seed,
    }
    if len(names) <= classes:
        return mean_of("gsq", _nearest_agrees(pooled, labels).double(), settings)
    values = []
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(seed + repeat)
        drawn = names[torch.randperm(len(names), generator=generator)[:classes]]
        chosen = torch.isin(labels.cpu(), drawn).to(pooled.device)
        values.append(_nearest_agrees(pooled[chosen], labels.to(pooled.device)[chosen]).double().mean().cpu())
    return mean_of("gsq", torch.stack(values), settings, over="repeats")


def nearest_neighbours(features: Tensor, block: int = 2048) -> Tensor:
    """Index of each row's nearest other row by the cosine of centred rows (Eq. 11-13): (N,) int64.

    Args:
        features: pooled latents, (N, C), N > 1.
        block: rows per block of similarities; memory is about 4 block N bytes.
    """
    x = features.double()
    x = F.normalize(x - x.mean(dim=0), dim=1).float()
    nearest = []
    for start in range(0, len(x), block):
        similarity = x[start : start + block] @ x.T
        rows = torch.arange(len(similarity), device=x.device)
        similarity[rows, rows + start] = -math.inf
        nearest.append(similarity.argmax(dim=1))
    return torch.cat(nearest)


def effective_rank(latents: Tensor, *, groups: int = 10) -> Estimate:
    """Share of the channels that pooled latents use (eRank, a diagnostic of arXiv:2605.07915).

        exp(-sum_i p_i log p_i) / C,   p = s / sum_j s_j,   s = singular values of the (N, C) pooled latents

    Args:
        latents: (B, C, h, w), or pooled already, (B, C). Not centred.
        groups: groups of the jackknife for the standard error; group g leaves out every `groups`-th image.

    Returns:
        A share in [1 / C, 1]: 1 for isotropic features, 1 / C for a single direction.

    Raises:
        ValueError: latents are not finite or all zero.
    """
    pooled = _pool(latents)
    n, channels = pooled.shape
    if n < channels:
        warnings.warn(
            f"eRank of {n} images in {channels} channels cannot exceed {n / channels:.2f}; give more images",
            stacklevel=2,
        )
    value = _effective_rank(pooled)
    groups = min(groups, n)
    stderr = None
    if groups > 1:
        number = torch.arange(n, device=pooled.device) % groups
        stderr = jackknife_error(torch.tensor([_effective_rank(pooled[number != g]) for g in range(groups)]))
    return Estimate(name="erank", value=value, stderr=stderr, n=n, settings={"channels": channels})


def singular_values(latents: Tensor) -> Tensor:
    """Singular values of the pooled latents, largest first: (min(N, C),) float64.

    Args:
        latents: (B, C, h, w), or pooled already, (B, C).

    Raises:
        ValueError: latents are not finite.
    """
    values: Tensor = torch.linalg.svdvals(_pool(latents).double())
    return values


def _effective_rank(pooled: Tensor) -> float:
    s = singular_values(pooled)
    if s.sum() == 0:
        raise ValueError("eRank is not defined for latents that are all zero")
    return float(torch.special.entr(s / s.sum()).sum().exp()) / pooled.shape[1]


def _nearest_agrees(pooled: Tensor, labels: Tensor) -> Tensor:
    labels = labels.to(pooled.device)
    return labels[nearest_neighbours(pooled)] == labels


def _pool(latents: Tensor) -> Tensor:
    """Average over the grid, (B, C). Pooled latents pass."""
    if latents.ndim == 2:
        if not latents.isfinite().all():
            raise ValueError("latents hold NaN or infinity")
        return latents
    check_latents(latents)
    return latents.float().mean(dim=(2, 3))


def check_latents(latents: Tensor) -> None:
    """Raise ValueError unless latents are (B, C, h, w) with B > 0, and finite."""
    if latents.ndim != 4 or len(latents) == 0:
        raise ValueError(f"latents must be (B, C, h, w) with B > 0, got {tuple(latents.shape)}")
    if not latents.isfinite().all():
        raise ValueError("latents hold NaN or infinity")
