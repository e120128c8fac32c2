"""Frechet distance between Gaussians, and the streaming statistics it needs. N samples, F features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean and covariance of a set of features, float64 on the CPU."""

    mean: Tensor
    """(F,)"""
    covariance: Tensor
    """(F, F), divided by n - 1."""
    n: int | None
    """Samples behind it; None where a statistics file does not say."""
    factor: Tensor | None = None
    """(n, F) with covariance = factor^T factor, kept where n < F: exact where the covariance is singular."""

    def __post_init__(self) -> None:
        features = len(self.mean)
        if self.mean.ndim != 1 or self.covariance.shape != (features, features):
            raise ValueError(
                f"mean and covariance must be (F,) and (F, F), got {tuple(self.mean.shape)} "
                f"and {tuple(self.covariance.shape)}"
            )
        if fault := _fault_of(self.mean, self.covariance):
            raise ValueError(f"statistics of features must be {fault}; make them again from the images")


def _fault_of(mean: Tensor, covariance: Tensor) -> str | None:
    """What mean (F,) and covariance (F, F) are not, up to the rounding of a file in float32."""
    if mean.is_complex() or covariance.is_complex():
        return "real numbers, got complex ones"
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        return "finite, got NaN or infinity"
    c = covariance.double()
    # Rounding entries to float32 moves eigenvalues by no more than F * 2^-24 of the largest entry.
    rounding = len(c) * 2.0**-24 * float(c.abs().max()) if len(c) else 0.0
    if len(c) and float((c - c.T).abs().max()) > rounding:
        return "symmetric: sigma is not the transpose of itself"
    # Twice the rounding, as a matrix that lies on the edge has a Cholesky factor by luck.
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
        """Take in n more samples whose own scatter was added already."""
        delta = mean - self.mean
        self.add_products(delta[None], self.n * n / (self.n + n))
        self.mean = self.mean + delta * (n / (self.n + n))
        self.n += n

    def add_products(self, rows: Tensor, weight: float = 1.0) -> None:
        """S <- S + weight rows^T rows, of rows (B, F). BLAS syrk computes half of it; PyTorch has no syrk."""
        if rows.device.type == "cpu":
            # Transposed views: BLAS reads by columns, and its upper triangle is our lower one.
            a, c = rows.numpy().T, self.scatter.numpy().T
            self.scatter = torch.from_numpy(dsyrk(weight, a, beta=1.0, c=c, overwrite_c=True).T)
        else:
            self.scatter.addmm_(rows.T, rows, alpha=weight)


class Moments:
    """Mean and covariance of a stream of feature batches, in float64.

        m <- m + (n_b / n) d,   S <- S + S_b + (n_a n_b / n) d d^T,   d = m_b - m_a   (Chan et al., 1979)

    Rows are absorbed in blocks of fixed size, so that the batch size of the caller changes nothing, and each
    block is centred by its own mean, so that features far from zero lose no digits. The streams of several
    processes are merged by the same formula.

    Args:
        block: rows per block.
    """

    def __init__(self, block: int = 1024) -> None:
        self.block = block
        self.sums: _Sums | None = None
        self.pending: list[Tensor] = []

    @property
    def n(self) -> int:
        """Samples seen so far."""
        return (0 if self.sums is None else self.sums.n) + sum(len(rows) for rows in self.pending)

    @property
    def width(self) -> int | None:
        """F, once known."""
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
        if not features.isfinite().all():
            raise ValueError("features hold NaN or infinity; look at the images and the extractor's weights")
        features = features.detach()
        if len(features) + sum(len(rows) for rows in self.pending) < self.block:
            self.pending.append(features.clone())
            return
        rows = torch.cat([*self.pending, features]) if self.pending else features
        full = len(rows) // self.block * self.block
        for start in range(0, full, self.block):
            self._absorb(rows[start : start + self.block])
        self.pending = [rows[full:].clone()] if full < len(rows) else []

    def merge(self, other: Moments) -> None:
        """Add what another process has seen; `other` stays as it is.

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
        """Mean and covariance of all that was seen so far; more may follow.

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
            total._absorb(torch.cat(total.pending))
        assert total.sums is not None
        lower = total.sums.scatter.div_(self.n - 1)
        covariance = lower.tril() + lower.tril(-1).T
        return Gaussian(mean=total.sums.mean.cpu(), covariance=covariance.cpu(), n=self.n, factor=factor)

    def _absorb(self, rows: Tensor) -> None:
        rows = rows.double()
        mean = rows.mean(0)
        if self.sums is None:
            self.sums = _Sums(0, torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean)))
        self.sums.add_products(rows - mean)
        self.sums.add_mean(len(rows), mean)


def gaussian_of(features: Tensor) -> Gaussian:
    """Mean and covariance of features (N, F) that fit into memory.

    Raises:
        ValueError: fewer than two samples, or not finite.
    """
    moments = Moments()
    moments.update(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians (Heusel et al., arXiv:1706.08500).

        |m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2),
        tr (A B)^(1/2) = sum_i sqrt(eig_i(A^(1/2) B A^(1/2))) = nuclear norm of F_a F_b^T,   A = F_a^T F_a

    Any factor A = F^T F serves in place of the root of A; Cholesky's is the fastest. A singular A has none
    and is factored by its eigenvectors. Only eigenvalues of symmetric matrices are taken: they are real and
    stay accurate where a covariance is ill-conditioned, which is where `sqrtm` of the product fails. Sets of
    fewer samples than features go through their factors, which is faster and exact.

    Returns:
        A number >= 0; what rounding leaves below zero is zero.

    Raises:
        ValueError: the two have different widths, or are so large that the distance overflows.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"both Gaussians must have one width, got {len(a.mean)} and {len(b.mean)} features")
    if a.factor is not None and b.factor is not None:
        overlap = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    elif a.factor is not None:
        overlap = _sum_of_roots(a.factor @ b.covariance @ a.factor.T)
    elif b.factor is not None:
        overlap = _sum_of_roots(b.factor @ a.covariance @ b.factor.T)
    else:
        root, failed = torch.linalg.cholesky_ex(a.covariance)  # A = root root^T
        if failed:
            values, vectors = torch.linalg.eigh(a.covariance)
            root = vectors * values.clamp(min=0).sqrt()
        overlap = _sum_of_roots(root.T @ b.covariance @ root)
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    if not distance.isfinite():  # max(0.0, nan) would be a perfect score
        raise ValueError("the Frechet distance is not finite: the statistics are too large for float64")
    return max(0.0, float(distance))


def _sum_of_roots(product: Tensor) -> Tensor:
    """Sum of the square roots of the eigenvalues of a positive semi-definite matrix."""
    eigenvalues: Tensor = torch.linalg.eigvalsh((product + product.T) / 2)
    return eigenvalues.clamp(min=0).sqrt().sum()
