"""Spectral clustering of the tokens of one latent (Eq. 7 of arXiv:2605.07915)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from openpae.models.layers import to_tokens
from openpae.runtime.extras import needs


def spectral_clusters(latent: Tensor, k: int, *, sigma: float = 0.1, seed: int = 0) -> Tensor:
    """Group the tokens of one latent by normalised spectral clustering (Shi and Malik, 2000; Eq. 7).

        A_ij = exp(cos(z_i, z_j) / sigma), A_ii = 0;   L = I - D^(-1/2) A D^(-1/2),   D = diag(sum_j A_ij)

    k-means on the rows of D^(-1/2) U, where U are the eigenvectors of the k smallest eigenvalues of L. The
    paper does not say how; our choice is that of scikit-learn's `SpectralClustering` on A.

    Args:
        latent: (C, h, w).
        k: number of clusters, at most h w.
        sigma: temperature, at least 0.01; smaller values give near tokens more weight.
        seed: seed of k-means (10 starts).

    Returns:
        Cluster of each token, (h, w) int64 in [0, k).

    Raises:
        ValueError: sigma or k is out of range.
    """
    with needs("eval", "SSC"):
        import scipy.linalg
        import sklearn
        from sklearn.cluster import KMeans

    tokens = latent.shape[-2] * latent.shape[-1]
    if sigma < 0.01:  # exp(-2 / sigma) of opposite tokens would underflow
        raise ValueError(f"sigma must be at least 0.01, got {sigma}")
    if not 1 <= k <= tokens:
        raise ValueError(f"k must be between 1 and the {tokens} tokens of a latent, got {k}")
    z = F.normalize(to_tokens(latent[None].double().cpu())[0], dim=-1)
    # Minus 1: a common factor of A cancels in L, and prevents overflow for a small sigma.
    affinity = torch.exp((z @ z.mT - 1) / sigma).fill_diagonal_(0)
    inverse_root = affinity.sum(dim=1).rsqrt()
    similarity = (inverse_root[:, None] * affinity * inverse_root).numpy()
    # The k largest eigenvalues of D^(-1/2) A D^(-1/2) are the k smallest of L.
    _, vectors = scipy.linalg.eigh(similarity, subset_by_index=(tokens - k, tokens - 1))
    embedding = vectors * inverse_root.numpy()[:, None]
    centred = embedding - embedding.mean(axis=0)  # as KMeans passes points to init
    norms = np.square(centred).sum(axis=1)
    squared = np.maximum(norms[:, None] + norms - 2 * centred @ centred.T, 0)

    starts = iter(plus_plus(squared, k, 10, np.random.RandomState(seed)))

    def start(
        points: NDArray[np.float64], k: int, random_state: np.random.RandomState
    ) -> NDArray[np.float64]:
        chosen: NDArray[np.float64] = points[next(starts)]
        return chosen

    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        clusters = KMeans(n_clusters=k, init=start, n_init=10, random_state=seed).fit_predict(embedding)
    return torch.from_numpy(clusters.astype(np.int64)).view(latent.shape[-2:])


def plus_plus(
    squared: NDArray[np.float64], k: int, starts: int, draws: np.random.RandomState
) -> NDArray[np.int64]:
    """First centres of k-means by greedy k-means++ (Arthur and Vassilvitskii, 2007): k of N points.

    For each centre, 2 + log k candidates are drawn with the squared distance to the nearest centre as weight,
    and the candidate with the smallest sum of squares is taken. Draws and choices equal those of starts of
    scikit-learn's "k-means++", one after the other, which computes the distances again for every start.

    Args:
        squared: squared distances of all pairs, (N, N).
        k: number of centres.
        starts: number of independent choices.
        draws: the source of random numbers.

    Returns:
        Indices of the centres, (starts, k).
    """
    count, each = len(squared), 2 + int(math.log(k))
    uniform = draws.random_sample((starts, 1 + (k - 1) * each))
    even = np.cumsum(np.full(count, 1 / count))
    centres = np.empty((starts, k), np.int64)
    centres[:, 0] = np.searchsorted(even / even[-1], uniform[:, 0], side="right")
    nearest = squared[centres[:, 0]]
    for number in range(1, k):
        part = uniform[:, 1 + (number - 1) * each : 1 + number * each]
        sums, aims = np.cumsum(nearest, axis=1), part * nearest.sum(axis=1, keepdims=True)
        candidates = (sums[:, None] < aims[..., None]).sum(axis=2).clip(max=count - 1)
        left = np.minimum(squared[candidates], nearest[:, None])
        best = np.arange(starts), left.sum(axis=2).argmin(axis=1)
        centres[:, number], nearest = candidates[best], left[best]
    return centres
