"""Frechet distance and streaming statistics: closed forms, references, edges, errors."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from openpae.eval.frechet import Gaussian, Moments, frechet_distance, gaussian_of


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def gaussian(mean: Tensor, covariance: Tensor) -> Gaussian:
    return Gaussian(mean=mean, covariance=covariance, n=None)


def features(n: int, width: int = 12, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, width, generator=generator) @ mixing + shift


def test_frechet_distance_of_axis_aligned_gaussians_has_a_closed_form() -> None:
    """Commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2, in any rotated frame."""
    a, b, m = torch.rand(9).double(), torch.rand(9).double(), torch.randn(9).double()
    r = rotation(9)
    distance = frechet_distance(
        gaussian(r @ m, r @ a.diag() @ r.T), gaussian(torch.zeros_like(m), r @ b.diag() @ r.T)
    )
    assert distance == pytest.approx(float(m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)


def test_frechet_distance_equals_the_textbook_with_sqrtm() -> None:
    x, y = features(400).numpy().astype(float), features(500, shift=0.3, seed=1).numpy().astype(float)
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(sx @ sy).real
    literal = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy - 2 * root)
    distance = frechet_distance(gaussian_of(torch.from_numpy(x)), gaussian_of(torch.from_numpy(y)))
    assert distance == pytest.approx(literal, rel=1e-8)


def test_frechet_distance_ignores_rotation_and_shift_and_is_quadratic_in_scale() -> None:
    x, y, r = features(60).double(), features(70, seed=1).double(), rotation(12)
    base = frechet_distance(gaussian_of(x), gaussian_of(y))
    moved = frechet_distance(gaussian_of(3 * x @ r + 5), gaussian_of(3 * y @ r + 5))
    assert moved == pytest.approx(9 * base, rel=1e-9)
    assert frechet_distance(gaussian_of(y), gaussian_of(x)) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(gaussian_of(x), gaussian_of(x)) < 1e-9 * base


@pytest.mark.parametrize("keep", [(True, True), (True, False), (False, True), (False, False)])
def test_singular_covariances_give_the_same_distance_by_factors_and_by_eigenvalues(
    keep: tuple[bool, bool],
) -> None:
    """20 samples in 64 dimensions: where sqrtm of the product returns NaN or imaginary parts."""
    sets = [gaussian_of(features(20, 64, seed=s)) for s in (1, 2)]
    exact = frechet_distance(*sets)
    a, b = (g if kept else gaussian(g.mean, g.covariance) for g, kept in zip(sets, keep, strict=True))
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)


def test_gaussians_in_orthogonal_subspaces_share_nothing() -> None:
    basis = rotation(30)
    a = gaussian(torch.zeros(30).double(), basis[:, :10] @ basis[:, :10].T)
    b = gaussian(torch.zeros(30).double(), 2 * basis[:, 10:20] @ basis[:, 10:20].T)
    assert frechet_distance(a, b) == pytest.approx(10 + 20, abs=1e-5)


def test_ill_conditioned_covariances_keep_their_distance() -> None:
    """Fifteen decades of variance, with a closed form because both share their axes."""
    a = torch.logspace(-12, 3, 50, dtype=torch.float64)
    b = a.flip(0)
    r = rotation(50)
    zero = torch.zeros(50).double()
    distance = frechet_distance(gaussian(zero, r @ a.diag() @ r.T), gaussian(zero, r @ b.diag() @ r.T))
    assert distance == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 64, 300])
def test_statistics_do_not_depend_on_the_batch_size(batch: int) -> None:
    x = features(300) * 0.01 + 1000  # far from zero: sums of squares would lose the variance
    moments = Moments(block=32)
    for part in x.split(batch):
        moments.update(part)
    fitted = moments.gaussian()
    expected = np.cov(x.double().numpy(), rowvar=False)
    torch.testing.assert_close(fitted.covariance, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fitted.mean, x.double().mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cut", [0, 5, 40, 100])
def test_statistics_of_two_processes_are_those_of_one(cut: int) -> None:
    x = features(100)
    total, first, second = Moments(block=16), Moments(block=16), Moments(block=16)
    for moments, rows in ((total, x), (first, x[:cut]), (second, x[cut:])):
        moments.update(rows)
    first.merge(second)
    torch.testing.assert_close(
        first.gaussian().covariance, total.gaussian().covariance, rtol=1e-11, atol=1e-12
    )
    assert first.n == 100
    assert second.n == 100 - cut


def test_statistics_can_be_read_before_the_end() -> None:
    x = features(50)
    moments = Moments(block=16)
    moments.update(x[:20])
    moments.gaussian()
    moments.update(x[20:])
    torch.testing.assert_close(
        moments.gaussian().covariance, gaussian_of(x).covariance, rtol=1e-11, atol=1e-12
    )


def test_bad_features_are_refused() -> None:
    moments = Moments()
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        moments.gaussian()
    moments.update(features(4))
    with pytest.raises(ValueError, match="width of 12, got 5"):
        moments.update(features(4, 5))
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments.update(features(4) / 0)
    with pytest.raises(ValueError, match=r"\(B, F\), got \(4,\)"):
        moments.update(torch.zeros(4))
    other = Moments()
    other.update(features(4, 5))
    with pytest.raises(ValueError, match="statistics of 5 features into those of 12"):
        moments.merge(other)
    with pytest.raises(ValueError, match="one width, got 12 and 5"):
        frechet_distance(gaussian_of(features(9)), gaussian_of(features(9, 5)))
    with pytest.raises(ValueError, match=r"\(F,\) and \(F, F\), got \(3,\) and \(2, 2\)"):
        gaussian(torch.zeros(3), torch.zeros(2, 2))


def test_no_distance_is_made_of_nan() -> None:
    """Not even of statistics whose own check was left out: max(0, NaN) would be a perfect score."""
    zero, one = torch.zeros(3).double(), torch.eye(3).double()
    broken = one.clone()
    broken[0, 1] = broken[1, 0] = torch.nan  # the trace does not show it
    factor = torch.full((2, 3), torch.nan).double()
    for odd in (
        Gaussian(mean=zero, covariance=broken, n=9, check=False),
        Gaussian(mean=zero, covariance=one, n=2, factor=factor, check=False),
    ):
        with pytest.raises(ValueError, match="the Frechet distance is not finite"):
            frechet_distance(gaussian(zero, one), odd)
    with pytest.raises(ValueError, match="finite, got NaN or infinity"):
        gaussian(zero, broken)


def test_a_covariance_that_cholesky_refuses_is_factored_by_its_eigenvectors() -> None:
    """Commuting covariances with eigenvalues of zero: sum (sqrt a - sqrt b)^2 again."""
    a = torch.tensor([4.0, 1.0, 0.0, 0.0]).double()
    b = torch.tensor([1.0, 0.0, 9.0, 0.0]).double()
    zero, expected = torch.zeros(4).double(), float((a.sqrt() - b.sqrt()).square().sum())
    assert torch.linalg.cholesky_ex(a.diag()).info > 0
    for first, second in ((a, b), (b, a)):
        assert frechet_distance(gaussian(zero, first.diag()), gaussian(zero, second.diag())) == pytest.approx(
            expected, rel=1e-12
        )


def test_covariance_is_symmetric_and_equals_numpys_far_from_zero() -> None:
    x = features(700).double() + 1e4
    fitted = gaussian_of(x)
    assert torch.equal(fitted.covariance, fitted.covariance.T)
    blocks = Moments(block=64)
    for part in x.split(50):
        blocks.update(part)
    expected = np.cov(x.numpy(), rowvar=False)
    for covariance in (fitted.covariance, blocks.gaussian().covariance):
        np.testing.assert_allclose(covariance.numpy(), expected, rtol=1e-9, atol=1e-9)
