"""Proxies of generation from latents alone: VIV, SEC, LNC and SRSS.

VIV, SEC and LNC are those of arXiv:2606.03578, SRSS is that of arXiv:2512.10794 as used there. All four see
latents whose channels have mean 0 and variance 1 over images and places, as the generator does. So a scale
and a shift of a channel change none of them. What the papers leave open is in docs/deviations.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from openpae.eval.estimate import Estimate, Settings, Undefined, jackknife_error, mean_of
from openpae.geometry.metrics import check_latents, majority_labels
from openpae.models.layers import to_tokens

MIN_PER_CLASS = 4
"""Fewest images of a class for its covariance in VIV."""


def normalised_channels(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) with mean 0 and variance 1 of each channel over images and places, float64.

    A constant channel becomes 0.

    Raises:
        ValueError: not (B, C, h, w), or not finite.
    """
    check_latents(latents)
    x = latents.double()
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / variance.sqrt().clamp_min(1e-8)


def velocity_irreducible_variance(
    latents: Tensor, labels: Tensor, *, iterations: int = 10
) -> Estimate | Undefined:
    """What no generator can know of the velocity (VIV, Eq. 3-5 of arXiv:2606.03578). Lower is better.

        mean over classes k of  pi/2 mean_i sqrt(lambda_ki),   lambda_k = eigenvalues of Cov_k ~ S_k (x) C_k

    With data N(mu_k, Cov_k) and the path x_t = t x_1 + (1 - t) x_0, it is the variance of x_1 - x_0 given x_t
    and k, integrated over t and divided by the dimension. S_k (places) and C_k (channels) are the maximum
    likelihood estimates (`kronecker_factors`), scaled so that the trace is that of the sample covariance.

    Args:
        latents: (B, C, h, w).
        labels: class of each image, (B,) int. Classes of fewer than `MIN_PER_CLASS` images are left out.
        iterations: of the flip-flop.

    Returns:
        Mean in [0, pi / 2] up to the classes' weights, with its standard error over classes. Undefined if
        fewer than two classes have enough images.

    Raises:
        ValueError: the shapes do not fit, or latents are not finite.
    """
    x = normalised_channels(latents).flatten(2)  # (B, C, S)
    names, counts = torch.unique(_classes(labels, x), return_counts=True)
    enough = names[counts >= MIN_PER_CLASS]
    if len(enough) < 2:
        return Undefined(
            "viv",
            f"it needs two classes of at least {MIN_PER_CLASS} images, and {len(enough)} of {len(names)} "
            "classes have as many; measure more images",
        )
    labels = labels.to(x.device)
    values = []
    for name in enough:
        own = x[labels == name]
        own = own - own.mean(dim=0)
        channels, places = kronecker_factors(own, iterations)
        roots = [torch.linalg.eigvalsh(factor).clamp_min(0).sqrt() for factor in (channels, places)]
        variance = own.square().sum() / (len(own) - 1)  # the trace of the sample covariance
        scale = (variance / (channels.trace() * places.trace()).clamp_min(1e-300)).sqrt()
        # The eigenvalues of a Kronecker product are all products, so the mean of their roots factorises.
        values.append(math.pi / 2 * scale * roots[0].mean() * roots[1].mean())
    settings: Settings = {"classes": len(enough), "known_classes": len(names), "images": len(x)}
    return mean_of("viv", torch.stack(values).cpu(), settings, over="classes")


def kronecker_factors(x: Tensor, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Covariances of channels and of places of centred matrices, by the flip-flop (Dutilleul, 1999).

        C = 1 / (N S) sum_n X_n P^-1 X_n^T,   P = 1 / (N C) sum_n X_n^T C^-1 X_n,   P = I at first

    A millionth of the mean variance on the diagonal keeps both invertible where there are few matrices.

    Args:
        x: X, (N, C, S), with mean 0 over N.
        iterations: number of times that both are updated.

    Returns:
        C, (C, C), and P, (S, S). Their product, not each of them, is determined.
    """
    n, channels, places = x.shape
    p = torch.eye(places, dtype=x.dtype, device=x.device)
    c = torch.eye(channels, dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        c = _ridged(torch.einsum("ncs,nds->cd", torch.linalg.solve(p, x.mT).mT, x) / (n * places))
        p = _ridged(torch.einsum("ncs,nct->st", torch.linalg.solve(c, x), x) / (n * channels))
    return c, p


def spectral_energy_concentration(
    latents: Tensor, *, threshold: float = 0.25, groups: int = 10
) -> Estimate | Undefined:
    """Share of high frequencies in the energy (SEC, Eq. 7-9 of arXiv:2606.03578). Lower is better.

        sum_{u + v > rho (h + w - 2)} E_uv / sum_uv E_uv,   E_uv = mean of DCT(z)_uv^2

    over images and channels. DCT is the orthonormal two-dimensional DCT-II of each channel.

    Args:
        latents: (B, C, h, w).
        threshold: rho in [0, 1].
        groups: groups of the jackknife for the standard error.

    Returns:
        A share in [0, 1]; 0 for latents that are constant over the places of each image. Undefined where all
        channels are constant over images too.

    Raises:
        ValueError: the threshold is out of range, or latents are not finite.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    x = normalised_channels(latents)
    rows, columns = (_cosines(side, x) for side in x.shape[-2:])
    energy = (rows @ x @ columns.mT).square().sum(dim=1)  # (B, h, w)
    h, w = x.shape[-2:]
    frequency = torch.arange(h, device=x.device)[:, None] + torch.arange(w, device=x.device)
    high = energy[:, frequency > threshold * (h + w - 2)].sum(dim=1)
    total = energy.sum(dim=(1, 2))
    if total.sum() == 0:
        return Undefined("sec", "all channels are constant, so there is no energy")
    groups = min(groups, len(x))
    stderr = None
    if groups > 1:
        number = torch.arange(len(x), device=x.device) % groups
        parts = [high[number != g].sum() / total[number != g].sum() for g in range(groups)]
        stderr = jackknife_error(torch.stack(parts))
    value = float(high.sum() / total.sum())
    return Estimate(name="sec", value=value, stderr=stderr, n=len(x), settings={"threshold": threshold})


def latent_neighbour_consistency(
    latents: Tensor, labels: Tensor, *, k: int = 5, foreground: Tensor | None = None
) -> Estimate | Undefined:
    """Share of an image's k nearest images that have its class (LNC of arXiv:2606.03578). Higher is better.

        mean_i 1/k #{j in nearest_k(i) : y_j = y_i},   nearest by the cosine of pooled latents

    Args:
        latents: (B, C, h, w).
        labels: class of each image, (B,) int.
        k: number of neighbours.
        foreground: places to pool, (B, h, w) bool, at least one in each image; None pools all.

    Returns:
        Mean in [0, 1] with its standard error over images. Undefined for one class or at most k images.

    Raises:
        ValueError: the shapes do not fit, or latents are not finite.
    """
    x = normalised_channels(latents)
    labels = _classes(labels, x)
    if len(torch.unique(labels)) < 2:
        return Undefined("lnc", "the images are all of one class; give a folder with one subfolder per class")
    if len(x) <= k:
        return Undefined("lnc", f"it needs more images than its {k} neighbours, got {len(x)}")
    chosen = x.new_ones(len(x), *x.shape[-2:]) if foreground is None else foreground.to(x)
    if chosen.shape != (len(x), *x.shape[-2:]) or not chosen.flatten(1).any(dim=1).all():
        raise ValueError(
            f"foreground must mark places (B, h, w) = {(len(x), *x.shape[-2:])} with at least one in each "
            f"image, got {tuple(chosen.shape)}"
        )
    pooled = torch.einsum("bchw,bhw->bc", x, chosen) / chosen.sum(dim=(1, 2))[:, None]
    unit = F.normalize(pooled, dim=1).float()
    labels, shares = labels.to(x.device), []
    for start in range(0, len(unit), 2048):
        similarity = unit[start : start + 2048] @ unit.T
        similarity.diagonal(start).fill_(-torch.inf)  # row r is image start + r itself
        nearest = labels[similarity.topk(k, dim=1).indices]
        shares.append((nearest == labels[start : start + 2048, None]).double().mean(dim=1))
    settings: Settings = {"k": k, "foreground": foreground is not None}
    return mean_of("lnc", torch.cat(shares).cpu(), settings)


def region_self_similarity(
    latents: Tensor, labels: Tensor, *, ignore: int | None = None
) -> Estimate | Undefined:
    """Are tokens more alike within a segment than across (SRSS, arXiv:2512.10794)? Higher is better.

        mean over images and tokens i of
        mean_{j != i, s_j = s_i} cos(z_i, z_j) - mean_{s_j != s_i} cos(z_i, z_j)

    Each cell of the grid takes the label of most of its pixels. Tokens without a partner on either side do
    not count, nor do images without a token that counts.

    Args:
        latents: (B, C, h, w).
        labels: segments of the same images, (B, H, W) int; H and W are multiples of h and w.
        ignore: label of pixels that do not count; None counts all.

    Returns:
        Mean in [-2, 2] with its standard error over images; settings hold the number of dropped images.
        Undefined if no image has two segments of which one holds two tokens.

    Raises:
        ValueError: the shapes do not fit, or latents are not finite.
    """
    x = normalised_channels(latents)
    if len(labels) != len(x):
        raise ValueError(f"labels must be one map for each of the {len(x)} images, got {len(labels)}")
    segments = majority_labels(labels, *x.shape[-2:], ignore=ignore).flatten(1).to(x.device)
    values = []
    for tokens, segment in zip(F.normalize(to_tokens(x), dim=-1), segments, strict=True):
        if ignore is not None:
            tokens, segment = tokens[segment != ignore], segment[segment != ignore]
        similarity = tokens @ tokens.mT
        same = segment[:, None] == segment
        within = same & ~torch.eye(len(segment), dtype=torch.bool, device=x.device)
        counts = within.sum(dim=1), (~same).sum(dim=1)
        usable = (counts[0] > 0) & (counts[1] > 0)
        if usable.any():
            gap = (similarity * within).sum(dim=1) / counts[0] - (similarity * ~same).sum(dim=1) / counts[1]
            values.append(gap[usable].mean())
    if not values:
        return Undefined("srss", f"none of the {len(labels)} label maps has two segments on its grid")
    settings: Settings = {
        "ignore": "none" if ignore is None else ignore,
        "dropped": len(labels) - len(values),
    }
    return mean_of("srss", torch.stack(values).cpu(), settings)


def _classes(labels: Tensor, x: Tensor) -> Tensor:
    if labels.shape != x.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be one class number for each of the {len(x)} latents, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    return labels


def _ridged(covariance: Tensor) -> Tensor:
    """Add a millionth of the mean variance, at least 1e-12, to the diagonal."""
    return covariance + torch.eye(len(covariance)).to(covariance) * (
        1e-6 * covariance.diagonal().mean()
    ).clamp_min(1e-12)


def _cosines(side: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II as a matrix (frequencies, places)."""
    place = torch.arange(side, dtype=like.dtype, device=like.device)
    matrix = torch.cos(torch.outer(place, place + 0.5) * (math.pi / side)) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
