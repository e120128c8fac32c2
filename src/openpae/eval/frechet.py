"""Frechet distance of Gaussians, and streaming mean and covariance. N samples, F features."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from openpae.runtime.extras import needs


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean and covariance of a set of features, float64 on the CPU."""

    mean: Tensor
    """(F,)"""
    covariance: Tensor
    """(F, F), divided by n - 1."""
    n: int | None
    """Number of samples; None if a statistics file does not hold it."""
    factor: Tensor | None = None
    """(n, F) with covariance = factor^T factor, kept if n < F: exact although the covariance is singular."""
    check: InitVar[bool] = True
    """Whether to check the values, which takes as long as a distance. `Moments` leaves it out."""

    def __post_init__(self, check: bool) -> None:
        features = len(self.mean)
        if self.mean.ndim != 1 or self.covariance.shape != (features, features):
            raise ValueError(
                f"mean and covariance must be (F,) and (F, F), got {tuple(self.mean.shape)} "
                f"and {tuple(self.covariance.shape)}"
            )
        if check and (fault := _fault_of(self.mean, self.covariance)):
            raise ValueError(f"statistics of features must be {fault}; make them again from the images")


def _fault_of(mean: Tensor, covariance: Tensor) -> str | None:
    """The first property that mean (F,) and covariance (F, F) lack, up to the rounding of float32."""
    if mean.is_complex() or covariance.is_complex():
        return "real numbers, got complex ones"
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        return "finite, got NaN or infinity"
    c = covariance.double()
    # Rounding entries to float32 moves eigenvalues by no more than F * 2^-24 of the largest entry.
    rounding = len(c) * 2.0**-24 * float(c.abs().max()) if len(c) else 0.0
    if len(c) and float((c - c.T).abs().max()) > rounding:
        return "symmetric: sigma is not the transpose of itself"
    # Twice the rounding: a matrix with an eigenvalue of exactly zero has a Cholesky factor only by chance.
    lifted = c + (2 * rounding + torch.finfo(torch.float64).tiny) * torch.eye(len(c), dtype=c.dtype)
    if torch.linalg.cholesky_ex(lifted).info:
        return "positive semi-definite: sigma has a negative eigenvalue, which no covariance has"
    return None


@dataclass
class _Sums:
    """Mean and scatter S = sum (x - m)(x - m)^T of n samples; only the lower triangle of S is kept."""

    n: int
    mean: Tensor
    scatter: Tensor

    def add_mean(self, n: int, mean: Tensor) -> None:
        """Add n samples with this mean. Their own scatter must have been added before."""
        delta = mean - self.mean
        self.add_products(delta[None], self.n * n / (self.n + n))
        self.mean = self.mean + delta * (n / (self.n + n))
        self.n += n

    def add_products(self, rows: Tensor, weight: float = 1.0) -> None:
        """S <- S + weight rows^T rows, of rows (B, F), by BLAS syrk: it computes one triangle only."""
        if rows.device.type == "cpu":
            with needs("eval", "the Frechet distance"):
                from scipy.linalg.blas import dsyrk
            # Transposed views: BLAS reads by columns, so its upper triangle is the lower one of S.
            a, c = rows.numpy().T, self.scatter.numpy().T
            self.scatter = torch.from_numpy(dsyrk(weight, a, beta=1.0, c=c, overwrite_c=True).T)
        else:
            self.scatter.addmm_(rows.T, rows, alpha=weight)


class Moments:
    """Mean and covariance of a stream of feature batches, in float64.

        m <- m + (n_b / n) d,   S <- S + S_b + (n_a n_b / n) d d^T,   d = m_b - m_a   (Chan et al., 1979)

    Rows are added in blocks of fixed size, so that the batch size of the caller changes nothing. Each block
    is centred by its own mean, so that features far from zero lose no digits. `merge` uses the same formula.

    Args:
        block: rows per block.
    """

    def __init__(self, block: int = 1024) -> None:
        self.block = block
        self.sums: _Sums | None = None
        self.pending: list[Tensor] = []

    @property
    def n(self) -> int:
        """Samples so far."""
        return (0 if self.sums is None else self.sums.n) + sum(len(rows) for rows in self.pending)

    @property
    def width(self) -> int | None:
        """F; None before the first update."""
        if self.sums is not None:
            return len(self.sums.mean)
        return self.pending[0].shape[1] if self.pending else None

    def update(self, features: Tensor) -> None:
        """Add features (B, F) of any float type.

        Raises:
            ValueError: not a matrix, another width than before, or not finite.
        """
        if features.ndim != 2:
            raise ValueError(f"features must be (B, F), got {tuple(features.shape)}")
        if self.width not in (None, features.shape[1]):
            raise ValueError(f"features must keep their width of {self.width}, got {features.shape[1]}")
        check_finite(features)
        features = features.detach()
        if len(features) + sum(len(rows) for rows in self.pending) < self.block:
            self.pending.append(features.clone())
            return
        rows = torch.cat([*self.pending, features]) if self.pending else features
        full = len(rows) // self.block * self.block
        for start in range(0, full, self.block):
            self._add(rows[start : start + self.block])
        self.pending = [rows[full:].clone()] if full < len(rows) else []

    def merge(self, other: Moments) -> None:
        """Add the samples of another stream; `other` does not change.

        Raises:
            ValueError: the widths differ.
        """
        if other.width is not None and self.width not in (None, other.width):
            raise ValueError(f"cannot merge statistics of {other.width} features into those of {self.width}")
        if other.sums is not None and self.sums is None:
            self.sums = _Sums(other.sums.n, other.sums.mean.clone(), other.sums.scatter.clone())
        elif other.sums is not None and self.sums is not None:
            self.sums.scatter += other.sums.scatter
            self.sums.add_mean(other.sums.n, other.sums.mean)
        for rows in other.pending:
            self.update(rows)

    def gaussian(self) -> Gaussian:
        """Mean and covariance of the samples so far; further updates may follow.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        factor = None
        if self.sums is None and self.width is not None and self.n < self.width:
            rows = torch.cat(self.pending).double()
            factor = ((rows - rows.mean(0)) / (self.n - 1) ** 0.5).cpu()
        total = Moments(self.block)
        total.merge(self)
        if total.pending:
            total._add(torch.cat(total.pending))
        assert total.sums is not None
        lower = total.sums.scatter.div_(self.n - 1).tril_()
        covariance = lower + lower.tril(-1).T
        mean = total.sums.mean.cpu()
        return Gaussian(mean=mean, covariance=covariance.cpu(), n=self.n, factor=factor, check=False)

    def _add(self, rows: Tensor) -> None:
        rows = rows.to(torch.float64, copy=True)
        mean = rows.mean(0)
        if self.sums is None:
            self.sums = _Sums(0, torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean)))
        self.sums.add_products(rows.sub_(mean))
        self.sums.add_mean(len(rows), mean)


def check_finite(features: Tensor) -> None:
    """Raise ValueError if features hold NaN or infinity: one pass, without a tensor of their size."""
    if features.numel() and not torch.stack(features.aminmax()).isfinite().all():
        raise ValueError("features hold NaN or infinity; look at the images and the extractor's weights")


def gaussian_of(features: Tensor) -> Gaussian:
    """Mean and covariance of features (N, F).

    Raises:
        ValueError: fewer than two samples, or not finite.
    """
    moments = Moments()
    moments.update(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians (Heusel et al., arXiv:1706.08500).

        |m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2),
        tr (A B)^(1/2) = sum_i sqrt(eig_i(A B)) = nuclear norm of F_a F_b^T,   A = F_a^T F_a

    LAPACK's `sygv` gives the eigenvalues of A B as those of R^T B R with Cholesky's A = R R^T: a symmetric
    matrix, so they are real, and accurate for an ill-conditioned covariance, where `sqrtm` of the product
    fails. A singular A has no Cholesky factor, so its eigenvectors give one. Sets of fewer samples than
    features use their factors, which is faster and exact.

    Returns:
        A number >= 0; rounding below zero is clamped.

    Raises:
        ValueError: the widths differ, or the distance overflows.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"both Gaussians must have one width, got {len(a.mean)} and {len(b.mean)} features")
    gap, spread_a, spread_b = (a.mean - b.mean).square().sum(), a.covariance.trace(), b.covariance.trace()
    if not (gap + spread_a * spread_b).isfinite():  # a bound of the eigenvalues of A B
        raise ValueError("the Frechet distance is not finite: the statistics are too large for float64")
    if a.factor is not None and b.factor is not None:
        overlap = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    elif a.factor is not None:
        overlap = _sum_of_roots(a.factor @ b.covariance @ a.factor.T)
    elif b.factor is not None:
        overlap = _sum_of_roots(b.factor @ a.covariance @ b.factor.T)
    else:
        overlap = _overlap(a.covariance, b.covariance)
    distance = gap + spread_a + spread_b - 2 * overlap
    if not distance.isfinite():  # max(0.0, nan) would be a perfect score
        raise ValueError("the Frechet distance is not finite: the eigenvalues of the statistics are not")
    return max(0.0, float(distance))


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """tr (A B)^(1/2) of two covariances (F, F)."""
    with needs("eval", "the Frechet distance"):
        from scipy.linalg import LinAlgError, eigh
    try:
        # Transposed views: LAPACK reads by columns, and both matrices are symmetric.
        pair = b.numpy().T, a.numpy().T
        values = eigh(*pair, type=2, eigvals_only=True, driver="gv", check_finite=False)
    except LinAlgError:  # A is singular
        values, vectors = torch.linalg.eigh(a)
        root = vectors * values.clamp(min=0).sqrt()
        return _sum_of_roots(root.T @ b @ root)
    return torch.from_numpy(values).clamp(min=0).sqrt().sum()


def _sum_of_roots(product: Tensor) -> Tensor:
    """Sum of the square roots of the eigenvalues of a positive semi-definite matrix."""
    eigenvalues: Tensor = torch.linalg.eigvalsh((product + product.T) / 2)
    return eigenvalues.clamp(min=0).sqrt().sum()
