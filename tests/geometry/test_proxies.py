"""VIV, SEC, LNC, SRSS: values by definition in NumPy, invariances, edge cases, errors."""

import math

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from openpae.eval.estimate import Estimate, Undefined
from openpae.geometry.proxies import (
    kronecker_factors,
    latent_neighbour_consistency,
    normalised_channels,
    region_self_similarity,
    spectral_energy_concentration,
    velocity_irreducible_variance,
)

LABELS = torch.arange(24) % 3


def latents(seed: int = 0, shape: tuple[int, ...] = (24, 6, 4, 5)) -> Tensor:
    """Correlated latents whose mean depends on the class, with other scales and shifts for each channel."""
    draw = np.random.default_rng(seed)
    mixed = np.einsum("bchw,cd->bdhw", draw.normal(size=shape), draw.normal(size=(shape[1], shape[1])))
    mixed += draw.normal(size=(3, *shape[1:]))[LABELS.numpy()[: shape[0]]]
    return torch.from_numpy(mixed * draw.uniform(0.1, 3, shape[1])[:, None, None] + 2)


def segments(seed: int = 1) -> Tensor:
    """Maps of three segments for `latents`, four pixels for each cell."""
    cells = np.random.default_rng(seed).integers(0, 3, (24, 4, 5))
    return torch.from_numpy(cells.repeat(4, axis=1).repeat(4, axis=2))


def normalised(z: Tensor) -> np.ndarray:
    x = z.numpy().astype(np.float64)
    return (x - x.mean(axis=(0, 2, 3), keepdims=True)) / x.std(axis=(0, 2, 3), keepdims=True)


def value(result: Estimate | Undefined) -> float:
    assert isinstance(result, Estimate)
    return result.value


def measured(z: Tensor, labels: Tensor = LABELS, maps: Tensor | None = None) -> dict[str, float]:
    return {
        "viv": value(velocity_irreducible_variance(z, labels)),
        "sec": value(spectral_energy_concentration(z)),
        "lnc": value(latent_neighbour_consistency(z, labels)),
        "srss": value(region_self_similarity(z, segments() if maps is None else maps)),
    }


def test_viv_is_the_irreducible_variance_of_a_literal_kronecker_covariance() -> None:
    x = normalised(latents())
    own = []
    for k in range(3):
        rows = x[LABELS.numpy() == k].reshape(8, 6, 20)
        rows = rows - rows.mean(axis=0)
        p = np.eye(20)
        for _ in range(10):
            c = sum(row @ np.linalg.inv(p) @ row.T for row in rows) / (8 * 20)
            c += 1e-6 * np.trace(c) / 6 * np.eye(6)
            p = sum(row.T @ np.linalg.inv(c) @ row for row in rows) / (8 * 6)
            p += 1e-6 * np.trace(p) / 20 * np.eye(20)
        covariance = np.kron(p, c)
        covariance *= (rows**2).sum() / 7 / np.trace(covariance)
        lam = np.linalg.eigvalsh(covariance)
        t = (np.arange(20_000) + 0.5) / 20_000  # the integral of Eq. 4 over t, by the midpoint rule
        integrals = [np.mean(one / ((1 - t) ** 2 + t**2 * one)) for one in lam]
        own.append(np.mean(integrals))
    result = velocity_irreducible_variance(latents(), LABELS)
    assert value(result) == pytest.approx(np.mean(own), rel=1e-4)
    assert isinstance(result, Estimate)
    assert result.stderr == pytest.approx(np.std(own, ddof=1) / math.sqrt(3), rel=1e-3)
    assert (result.n, result.over) == (3, "classes")


def test_the_flip_flop_finds_the_factors_of_a_kronecker_covariance() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=(3, 3)), draw.normal(size=(4, 4))
    x = torch.from_numpy(a @ draw.normal(size=(20_000, 3, 4)) @ b.T)
    c, p = kronecker_factors(x)
    truth = np.kron(b @ b.T, a @ a.T)
    # 20,000 matrices: entries of a covariance err by about 1 / sqrt(20,000) of their scale.
    np.testing.assert_allclose(np.kron(p.numpy(), c.numpy()), truth, atol=0.05 * np.abs(truth).max())


def test_viv_falls_with_compact_classes_and_is_half_pi_for_white_latents() -> None:
    white = torch.from_numpy(np.random.default_rng(0).normal(size=(400, 3, 2, 2)))
    labels = torch.arange(400) % 2
    # The mean root of estimated variances of 200 images misses 1 by less than 2 %.
    assert value(velocity_irreducible_variance(white, labels)) == pytest.approx(math.pi / 2, rel=0.02)
    far = white + 5 * labels[:, None, None, None]
    # The global variance is then 1 + 6.25, of which 1 is within the classes.
    compact = math.pi / 2 / math.sqrt(7.25)
    assert value(velocity_irreducible_variance(far, labels)) == pytest.approx(compact, rel=0.03)


def test_sec_is_the_share_of_scipys_dct() -> None:
    energy = (scipy.fft.dctn(normalised(latents()), axes=(2, 3), norm="ortho") ** 2).mean(axis=(0, 1))
    for threshold in (0.0, 0.25, 0.5):
        high = sum(energy[u, v] for u in range(4) for v in range(5) if u + v > threshold * (3 + 4))
        result = spectral_energy_concentration(latents(), threshold=threshold)
        assert value(result) == pytest.approx(high / energy.sum(), rel=1e-9)


def test_sec_of_constant_and_of_alternating_maps() -> None:
    flat = latents()[:, :, :1, :1].expand(-1, -1, 4, 5)
    assert value(spectral_energy_concentration(flat)) == pytest.approx(0, abs=1e-12)
    signs = 1 - 2 * ((torch.arange(4)[:, None] + torch.arange(4)) % 2)
    board = latents()[:, :, :1, :1] * signs
    assert value(spectral_energy_concentration(board, threshold=0.0)) == pytest.approx(1)
    constant = spectral_energy_concentration(torch.ones(4, 2, 3, 3))
    assert constant == Undefined("sec", "all channels are constant, so there is no energy")


def test_lnc_is_the_literal_share_of_neighbours() -> None:
    x, labels = normalised(latents()), LABELS.numpy()
    for chosen in (None, segments()[:, ::4, ::4] > 0):
        weights = np.ones((24, 4, 5)) if chosen is None else chosen.numpy().astype(float)
        pooled = (x * weights[:, None]).sum(axis=(2, 3)) / weights.sum(axis=(1, 2))[:, None]
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        shares = []
        for i in range(24):
            order = sorted((j for j in range(24) if j != i), key=lambda j: -pooled[i] @ pooled[j])
            shares.append(np.mean(labels[order[:5]] == labels[i]))
        result = latent_neighbour_consistency(latents(), LABELS, foreground=chosen)
        assert value(result) == pytest.approx(np.mean(shares))
        assert isinstance(result, Estimate)
        assert result.stderr == pytest.approx(np.std(shares, ddof=1) / math.sqrt(24))


@pytest.mark.parametrize("ignore", [None, 2])
def test_srss_is_the_literal_gap_of_cosines(ignore: int | None) -> None:
    x, cells = normalised(latents()), segments()[:, ::4, ::4].flatten(1).numpy()
    values = []
    for tokens, segment in zip(x.reshape(24, 6, 20).transpose(0, 2, 1), cells, strict=True):
        gaps = []
        for i in range(20):
            sides: tuple[list[float], list[float]] = ([], [])
            for j in range(20):
                if i != j and ignore not in (segment[i], segment[j]):
                    cosine = tokens[i] @ tokens[j] / np.linalg.norm(tokens[i]) / np.linalg.norm(tokens[j])
                    sides[int(segment[i] != segment[j])].append(cosine)
            if sides[0] and sides[1]:
                gaps.append(np.mean(sides[0]) - np.mean(sides[1]))
        values.append(np.mean(gaps))
    result = region_self_similarity(latents(), segments(), ignore=ignore)
    assert value(result) == pytest.approx(np.mean(values), rel=1e-9)
    assert isinstance(result, Estimate)
    assert result.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(24))


def test_srss_is_2_where_segments_are_opposite() -> None:
    maps = segments() > 0
    signs = 1.0 - 2.0 * maps[:, ::4, ::4][:, None]
    direction = torch.tensor([1.0, -2.0, 3.0])[:, None, None]
    # Not exactly 2: the normalisation moves the mean of the tokens to 0.
    balanced = torch.cat([signs * direction, -signs * direction])
    assert value(region_self_similarity(balanced, maps.repeat(2, 1, 1).long())) == pytest.approx(2)


def test_scale_and_shift_of_a_channel_and_orders_change_nothing() -> None:
    z = latents()
    expected = measured(z)
    channels, images = torch.tensor([3, 0, 5, 1, 4, 2]), torch.randperm(24, generator=torch.manual_seed(0))
    scale, shift = torch.linspace(0.2, 5, 6)[:, None, None], torch.linspace(-3, 3, 6)[:, None, None]
    for other in (measured(z * scale + shift), measured(z[:, channels]), measured(-z)):
        assert other == pytest.approx(expected, rel=1e-6)
    assert measured(z[images], LABELS[images], segments()[images]) == pytest.approx(expected, rel=1e-6)


def test_only_sec_depends_on_the_order_of_places() -> None:
    z, places = latents(), torch.randperm(20, generator=torch.manual_seed(1))
    moved = z.flatten(2)[:, :, places].view(z.shape)
    maps = segments()[:, ::4, ::4].flatten(1)[:, places].view(24, 4, 5)
    before, after = measured(z), measured(moved, maps=maps.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert after.pop("sec") != pytest.approx(before.pop("sec"), rel=1e-3)
    assert after == pytest.approx(before, rel=1e-6)


def test_undefined_says_what_is_missing() -> None:
    z = latents()
    alone = velocity_irreducible_variance(z, torch.arange(24))
    assert isinstance(alone, Undefined)
    assert "at least 4 images, and 0 of 24 classes" in alone.reason
    one = latent_neighbour_consistency(z, torch.zeros(24, dtype=torch.int64))
    assert isinstance(one, Undefined)
    assert "one subfolder per class" in one.reason
    few = latent_neighbour_consistency(z[:5], LABELS[:5])
    assert few == Undefined("lnc", "it needs more images than its 5 neighbours, got 5")
    flat = region_self_similarity(z, torch.zeros(24, 4, 5, dtype=torch.int64))
    assert flat == Undefined("srss", "none of the 24 label maps has two segments on its grid")


def test_errors_say_what_was_given() -> None:
    z = latents()
    with pytest.raises(ValueError, match=r"labels must be one class number for each of the 24 latents"):
        velocity_irreducible_variance(z, LABELS[:4])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        spectral_energy_concentration(z, threshold=2)
    with pytest.raises(ValueError, match="foreground must mark places"):
        latent_neighbour_consistency(z, LABELS, foreground=torch.zeros(24, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="labels must be one map for each of the 24 images, got 3"):
        region_self_similarity(z, segments()[:3])
    with pytest.raises(ValueError, match="NaN or infinity"):
        normalised_channels(z / 0)
