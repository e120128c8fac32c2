"""Scores of generated images from their features: Inception Score, KID, MIND, precision and recall."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from openpae.eval.estimate import Estimate, Settings, mean_of
from openpae.eval.frechet import check_finite


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 2020) -> Estimate:
    """Inception Score (Salimans et al., arXiv:1606.03498).

        exp(mean_x KL(p(y|x) || p(y))) = exp(H(mean_x p(y|x)) - mean_x H(p(y|x)))

    Mean over splits of the shuffled samples, with the shuffle of torch-fidelity. The ADM evaluator does not
    shuffle, and its splits hold 5,000 samples.

    Args:
        logits: (N, K), of the Inception network without the bias of its last layer.
        splits: number of splits.
        seed: seed of the shuffle.

    Returns:
        A value in [1, K]; std over splits divides by their number, as in torch-fidelity.

    Raises:
        ValueError: fewer samples than splits, or logits that are not finite.
    """
    check_finite(logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must be between 1 and the {len(logits)} samples, got {splits}")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    p = logits[order.to(logits.device)].double().softmax(dim=1)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        divergence = torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()
        scores.append(math.exp(divergence))
    std = float(np.std(scores))
    return Estimate(
        name="inception_score",
        value=float(np.mean(scores)),
        std=std,
        stderr=std / math.sqrt(splits - 1) if splits > 1 else None,
        n=splits,
        over="splits",
        settings={"samples": len(logits), "seed": seed},
    )


def kid(
    samples: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Estimate:
    """Kernel Inception Distance (Binkowski et al., arXiv:1801.01401).

        MMD^2 = sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_{i, j} k(x_i, y_j) / m^2,
        k(x, y) = (x . y / F + 1)^3

    Unbiased: values of different sample counts compare, and a value may be below zero. Mean over random
    subsets of m samples; a seed gives the subsets of torch-fidelity. Subsets share the kernel of the full
    sets where that is smaller than their own kernels together. Kernels, and their sums over up to 1,024
    partners, are computed in the type of the samples, usually float32; the rest is summed in float64.

    Args:
        samples: features (N, F).
        reference: features (M, F).
        subsets: number of subsets.
        subset_size: m.
        seed: seed of the subsets.

    Returns:
        The mean; std over subsets divides by their number. The standard error counts the choice of subsets
        only, not that of the samples.

    Raises:
        ValueError: the widths differ, features are not finite, or a set is smaller than a subset.
    """
    _check_widths(samples, reference)
    smaller = min(len(samples), len(reference))
    if not 2 <= subset_size <= smaller:
        raise ValueError(
            f"kid_subset_size must be between 2 and the {smaller} samples of the smaller set, "
            f"got {subset_size}"
        )
    x, y, draw = samples, reference.to(samples), np.random.RandomState(seed)
    in_x, in_y = (torch.zeros(len(part), subsets, dtype=x.dtype) for part in (x, y))
    for subset in range(subsets):  # torch-fidelity draws the samples first, then the reference
        for members in (in_x, in_y):
            members[torch.from_numpy(draw.choice(len(members), subset_size, replace=False)), subset] = 1
    in_x, in_y = in_x.to(x.device), in_y.to(x.device)
    if (len(x) + len(y)) ** 2 < subsets * (2 * subset_size) ** 2:
        values = _squared_mmd(x, y, in_x, in_y).tolist()
    else:
        every, pairs = x.new_ones(subset_size, 1), zip(in_x.T.bool(), in_y.T.bool(), strict=True)
        values = [float(_squared_mmd(x[some], y[others], every, every)) for some, others in pairs]
    std = float(np.std(values))
    return Estimate(
        name="kid",
        value=float(np.mean(values)),
        std=std,
        stderr=std / math.sqrt(subsets - 1) if subsets > 1 else None,
        n=subsets,
        over="subsets",
        settings={
            "subset_size": subset_size,
            "samples": len(samples),
            "reference": len(reference),
            "seed": seed,
        },
    )


def monge_inception_distance(
    samples: Tensor, reference: Tensor, *, projections: int = 1000, seed: int = 2020
) -> Estimate:
    """Monge Inception Distance (MIND, Berthet et al., arXiv:2605.06797): a sliced Wasserstein distance.

        3 F mean_u mean_i (sort(u . x)_i - sort(u . y)_i)^2,   u uniform on the unit sphere

    Both sets have one size: the larger one is drawn from without replacement. It falls with the number of
    samples, faster than the Frechet distance does. It is the published MIND in Inception features only.

    Args:
        samples: features x, (N, F).
        reference: features y, (M, F).
        projections: number of directions u.
        seed: seed of the directions and of the draw.

    Returns:
        The mean over directions; the standard error counts the choice of directions only.

    Raises:
        ValueError: the widths differ, features are not finite, or there are no samples.
    """
    _check_widths(samples, reference)
    size, width = min(len(samples), len(reference)), samples.shape[1]
    draw = np.random.default_rng(seed)
    u = torch.from_numpy(draw.standard_normal((projections, width))).float()
    directions = (u / u.norm(dim=1, keepdim=True)).to(samples)
    x, y = (
        part
        if len(part) == size
        else part[torch.from_numpy(draw.permutation(len(part))[:size]).to(part.device)]
        for part in (samples, reference.to(samples))
    )
    values = []
    for chunk in torch.split(directions, 100):
        gaps = (x @ chunk.T).sort(dim=0).values - (y @ chunk.T).sort(dim=0).values
        values.append(3 * width * gaps.double().square().mean(dim=0))
    settings: Settings = {"samples": len(samples), "reference": len(reference), "used": size, "seed": seed}
    return mean_of("mind", torch.cat(values).cpu(), settings, over="directions")


def precision_recall(
    samples: Tensor, reference: Tensor, *, k: int = 3, block: int = 2048
) -> tuple[Estimate, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv:1904.06991).

        precision = share of samples x with |x - y| <= r_k(y) for some reference y
        recall    = share of reference y with |x - y| <= r_k(x) for some sample x

    r_k is the distance to the k-th nearest neighbour in the same set. Distances are float32 after the mean of
    the reference is subtracted; the ADM evaluator rounds them to float16.

    Args:
        samples: features (N, F).
        reference: features (M, F).
        k: which neighbour gives the radius.
        block: rows per block of distances; memory is about 8 block max(M, block) bytes.

    Returns:
        Precision and recall, shares in [0, 1], with the standard error of a share.

    Raises:
        ValueError: the widths differ, features are not finite, or a set has no k-th neighbour.
    """
    _check_widths(samples, reference)
    if not 1 <= k < min(len(samples), len(reference)):
        raise ValueError(
            f"k must be at least 1 and below the sizes of both sets, got k = {k} "
            f"for {len(samples)} samples and {len(reference)} reference images"
        )
    centre = reference.double().mean(0)
    x = (samples.double() - centre.to(samples.device)).float()
    y = (reference.double() - centre).float().to(x.device)
    reach_x, reach_y = _radii(x, k, block), _radii(y, k, block)
    precise = torch.empty(len(x), dtype=torch.bool, device=x.device)
    recalled = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), block):  # each distance counts for both shares
        rows = slice(start, start + block)
        distances = _squared_distances(x[rows], y)
        precise[rows] = (distances <= reach_y).any(dim=1)
        recalled |= (distances <= reach_x[rows, None]).any(dim=0)
    settings: Settings = {"k": k, "samples": len(samples), "reference": len(reference)}
    return _share("precision", precise, settings), _share("recall", recalled, settings)


def _check_widths(samples: Tensor, reference: Tensor) -> None:
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features must be (N, F) and (M, F) of one width, got {tuple(samples.shape)} "
            f"and {tuple(reference.shape)}"
        )
    check_finite(samples)
    check_finite(reference)


def _squared_mmd(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """MMD^2 of `kid` for each of S subsets: (S,) float64.

    Membership in_x (N, S) and in_y (M, S) is 1 or 0.
    """
    m = in_x[:, 0].sum(dtype=torch.float64)
    within = _kernel_sums(x, x, in_x, in_x, same=True) + _kernel_sums(y, y, in_y, in_y, same=True)
    return within / (m * (m - 1)) - 2 * _kernel_sums(x, y, in_x, in_y, same=False) / m**2


def _kernel_sums(
    x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor, *, same: bool, block: int = 1024
) -> Tensor:
    """Sum of k(x_i, y_j) over the pairs of each subset, (S,) float64; without i = j if `same`."""
    sums = torch.zeros(in_x.shape[1], dtype=torch.float64, device=x.device)
    for top in range(0, len(x), block):
        rows = slice(top, top + block)
        for left in range(top if same else 0, len(y), block):
            columns = slice(left, left + block)
            kernel = _products(x[rows], y[columns]).div_(x.shape[1]).add_(1).pow_(3)
            if same and left == top:
                kernel.fill_diagonal_(0)
            part = (kernel @ in_y[columns]).mul_(in_x[rows]).sum(0, dtype=torch.float64)
            sums += 2 * part if same and left > top else part  # the kernel is symmetric
    return sums


def _products(x: Tensor, y: Tensor) -> Tensor:
    # NumPy's matrices multiply faster on many processors, and x x^T by syrk in half of the time.
    return torch.from_numpy(x.numpy() @ y.numpy().T) if x.device.type == "cpu" else x @ y.T


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    products = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)  # |y|^2 - 2 x . y
    return products.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """Squared distance of each row to its k-th neighbour: (N,). Each pair of blocks is computed once."""
    nearest = features.new_full((len(features), k), math.inf)

    def keep_nearest(rows: slice, distances: Tensor) -> None:
        nearest[rows] = torch.cat([nearest[rows], distances], dim=1).topk(k, largest=False).values

    blocks = [slice(start, start + block) for start in range(0, len(features), block)]
    for number, rows in enumerate(blocks):
        own = _squared_distances(features[rows], features[rows]).fill_diagonal_(math.inf)
        keep_nearest(rows, own)
        for columns in blocks[number + 1 :]:
            distances = _squared_distances(features[rows], features[columns])
            keep_nearest(rows, distances)
            keep_nearest(columns, distances.T)
    return nearest.amax(dim=1)


def _share(name: str, hits: Tensor, settings: Settings) -> Estimate:
    p, n = float(hits.double().mean()), len(hits)
    return Estimate(
        name=name, value=p, stderr=math.sqrt(p * (1 - p) / (n - 1)), n=n, over="images", settings=settings
    )
