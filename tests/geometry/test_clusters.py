"""Spectral clustering: first centres and clusters equal those of scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, SpectralClustering, kmeans_plusplus
from sklearn.metrics import adjusted_rand_score, pairwise
from torch.nn import functional as F

from openpae.geometry.clusters import plus_plus, spectral_clusters


@pytest.mark.parametrize("k", [1, 2, 7, 20])
def test_first_centres_equal_those_of_scikit_learn(k: int) -> None:
    """Distances of whole numbers have no rounding."""
    points = np.random.default_rng(k).integers(0, 100, (50, 5)).astype(float)
    draws = np.random.RandomState(3)
    expected = [kmeans_plusplus(points, k, random_state=draws)[1].tolist() for _ in range(4)]
    squared = pairwise.euclidean_distances(points, squared=True)
    assert plus_plus(squared, k, 4, np.random.RandomState(3)).tolist() == expected


def test_distinct_points_are_chosen_before_duplicates() -> None:
    points = np.array([[0.0], [0.0], [1.0], [1.0], [2.0]])
    squared = pairwise.euclidean_distances(points, squared=True)
    for centres in plus_plus(squared, 3, 5, np.random.RandomState(0)):
        assert set(points[centres, 0]) == {0.0, 1.0, 2.0}


def test_clusters_equal_those_of_kmeans_with_its_own_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers."""
    latents = F.interpolate(torch.randn(6, 8, 3, 3), size=8, mode="bicubic") + 0.2 * torch.randn(6, 8, 8, 8)
    ours = [spectral_clusters(latent, k) for k, latent in enumerate(latents, start=2)]
    original = KMeans.__init__

    def plain(self: KMeans, n_clusters: int, *, init: object, **settings: object) -> None:
        original(self, n_clusters, init="k-means++", **settings)

    monkeypatch.setattr(KMeans, "__init__", plain)
    for k, (latent, clusters) in enumerate(zip(latents, ours, strict=True), start=2):
        assert torch.equal(clusters, spectral_clusters(latent, k))


def test_clusters_agree_with_scikit_learns_spectral_clustering() -> None:
    """Four well separated groups of directions: both recover them."""
    truth = torch.arange(64).view(8, 8) % 4
    latent = (4 * torch.eye(6)[truth] + 0.3 * torch.randn(8, 8, 6)).movedim(-1, 0)
    z = F.normalize(latent.flatten(1).T.double(), dim=-1)
    affinity = torch.exp((z @ z.T - 1) / 0.1).fill_diagonal_(0).numpy()
    theirs = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(affinity)
    ours = spectral_clusters(latent, 4).flatten().numpy()
    assert adjusted_rand_score(truth.flatten(), ours) == 1
    assert adjusted_rand_score(theirs, ours) == 1
