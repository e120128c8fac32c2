"""Interpolated Frechet distance: edge cases, values by definition, draws, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from openpae.eval.extractors import Features
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import frechet_distance, gaussian_of
from openpae.geometry.interpolation import interpolated_frechet, latent_partners
from openpae.models.layers import slerp


class Pixels:
    """An extractor that returns the pixels."""

    name, weights = "pixels", "none"

    def features(self, images: Tensor) -> Features:
        return Features(pooled=images.flatten(1))


def decode(z: Tensor) -> Tensor:
    return torch.sigmoid(z[:, :3])


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(12, 4, 2, 2)


def test_slerp_keeps_length_and_halves_the_angle() -> None:
    a, b = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    middle = slerp(a, b, 0.5)
    torch.testing.assert_close(middle.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    to_a, to_b = (torch.cosine_similarity(middle.flatten(1), x.flatten(1)) for x in (a, b))
    torch.testing.assert_close(to_a, to_b)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)  # parallel: linear interpolation


def test_the_nearest_partner_has_the_largest_cosine(latents: Tensor) -> None:
    partners = latent_partners(latents, block=5)
    x = latents.flatten(1).double().numpy()
    for i, row in enumerate(x):
        cosines = [
            -math.inf if j == i else row @ other / np.linalg.norm(row) / np.linalg.norm(other)
            for j, other in enumerate(x)
        ]
        assert partners[i] == int(np.argmax(cosines))
    assert torch.equal(
        latent_partners(latents, pool=latents), torch.arange(12)
    )  # the pool may hold the same latents


def test_partner_is_drawn_among_candidates_by_distance() -> None:
    latents = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).expand(2000, 1, 1, 2)
    pool = torch.tensor([[1.0, 0.0], [1.0, 0.1], [3.0, 0.0], [-1.0, 0.0]]).view(4, 1, 1, 2)
    drawn = latent_partners(latents, pool=pool, candidates=3)
    weights = np.exp([-0.0, -0.005, -2.0])  # mean squared distances of the three of nearest direction
    expected = weights / weights.sum()
    assert np.allclose(np.bincount(drawn, minlength=4) / 2000, [*expected, 0], atol=0.03)
    # The draw of an image does not depend on the other images.
    assert torch.equal(latent_partners(latents[:9], pool=pool, candidates=3, block=2), drawn[:9])


def test_interpolated_frechet_is_the_distance_of_decoded_midpoints(latents: Tensor) -> None:
    real = FeatureSet(Pixels())
    images = (decode(latents) * 255).round() / 255
    real.update(images)
    estimate = interpolated_frechet(latents, decode, real, batch_size=5)
    between = decode(slerp(latents, latents[latent_partners(latents)], 0.5))
    literal = frechet_distance(
        gaussian_of((between * 255).round().flatten(1) / 255), gaussian_of(images.flatten(1))
    )
    assert estimate.value == pytest.approx(literal, rel=1e-6)
    assert (estimate.n, estimate.settings["pool"], estimate.settings["extractor"]) == (12, 12, "pixels")
    itself = interpolated_frechet(latents, decode, real, pool=latents)  # the nearest is the image itself
    assert itself.value == pytest.approx(0, abs=1e-9)


def test_pools_that_do_not_fit_are_refused(latents: Tensor) -> None:
    with pytest.raises(ValueError, match="between 1 and the 11 latents of the pool, got 12"):
        latent_partners(latents, candidates=12)
    with pytest.raises(ValueError, match=r"must hold latents \(4, 2, 2\), got \(3, 2, 2\)"):
        latent_partners(latents, pool=latents[:, :3])
