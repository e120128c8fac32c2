"""Stage (a): refined and compressed features of the VFM, the targets of the alignment (Sec. 3.3).

    Z_T = P_t(H_vfm),   H^ = Q_t(Z_T),   H_ref = down(low_pass(upsample(H_vfm, image)))

The refiner (P_t, Q_t) learns to preserve the features and the Gram matrix of H_ref (`upsampling.py`). After
its training Z_T is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from openpae.models.configs import LinearTargetsConfig, RefinerConfig
from openpae.models.layers import TransformerBlock, init_vit, sincos_2d, to_sphere
from openpae.models.upsampling import full_precision


class Prior(Protocol):
    """The interface of the targets of SSR and SCR; every such callable can be passed."""

    def __call__(self, features: Tensor) -> Tensor:
        """Targets (B, N, C) of features H_vfm (B, N, D), on the sphere, without gradient."""
        ...


class TargetProjector(nn.Module):
    """P_t: one transformer block on the features, a linear layer D -> C, the sphere norm.

    Our choice: the paper says only that P_t compresses. The residual passes the features to the linear layer.
    There are no positions, because the features contain them.
    """

    def __init__(self, feature_dim: int, latent_dim: int, num_heads: int) -> None:
        super().__init__()
        self.block = TransformerBlock(feature_dim, num_heads, 4 * feature_dim, norm_eps=1e-6)
        self.to_latent = nn.Linear(feature_dim, latent_dim)
        init_vit(self)

    def forward(self, features: Tensor) -> Tensor:
        """features H_vfm: (B, N, D). Returns Z_T: (B, N, C), on the sphere, float32."""
        return _tokens_to_sphere(self.to_latent(self.block(features)))


class FeatureDecoder(nn.Module):
    """Q_t: a ViT with fixed sine-cosine positions from targets back to features."""

    positions: Tensor

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__()
        width = config.decoder_dim
        self.embed = nn.Linear(config.latent_dim, width)
        self.register_buffer("positions", sincos_2d(*config.grid_shape, width)[None], persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.decoder_heads, 4 * width, norm_eps=1e-6)
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_features = nn.Linear(width, config.feature_dim)
        init_vit(self)

    def forward(self, prior: Tensor) -> Tensor:
        """prior Z_T: (B, N, C). Returns H^: (B, N, D), float32."""
        x = self.embed(prior) + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.to_features(self.norm(x))
        return out.float()


class Refiner(nn.Module):
    """P_t and Q_t, trained together; `FrozenPrior` uses only P_t.

    Args:
        config: its sizes.
    """

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = TargetProjector(config.feature_dim, config.latent_dim, config.num_heads)
        self.decoder = FeatureDecoder(config)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and their reconstruction in one pass, as a distributed wrapper needs it.

        Args:
            features: H_vfm, (B, N, D).

        Returns:
            Z_T (B, N, C) and H^ (B, N, D).
        """
        prior = self.project(features)
        return prior, self.reconstruct(prior)

    def project(self, features: Tensor) -> Tensor:
        """Targets Z_T = P_t(H_vfm) of features (B, N, D): (B, N, C), on the sphere, float32.

        Raises:
            ValueError: the width is not config.feature_dim.
        """
        _check_width(features, self.config.feature_dim)
        prior: Tensor = self.projector(features.float())  # cached features come in float16
        return prior

    def reconstruct(self, prior: Tensor) -> Tensor:
        """Features H^ = Q_t(Z_T) of targets (B, N, C): (B, N, D), float32.

        Raises:
            ValueError: N or C differs from the config.
        """
        expected = (math.prod(self.config.grid_shape), self.config.latent_dim)
        if tuple(prior.shape[1:]) != expected:
            raise ValueError(f"prior must be (B, N, C) with (N, C) = {expected}, got {tuple(prior.shape)}")
        features: Tensor = self.decoder(prior)
        return features


class LinearTargets(nn.Module):
    """Raw targets: z_i = sphere(U^T (h_i - m)), no refinement (Table 2b).

    The columns of U are orthonormal. For "pca" they are the first C principal directions of the features, and
    m is the mean: the linear map whose inner products are nearest to those of the centred features. Whitening
    would change the inner products. For "random" they span a random subspace, and m is 0.

    Args:
        config: its sizes. The map starts as zeros; `fit_pca` and `random_targets` fill it.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, config: LinearTargetsConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.feature_dim))
        self.register_buffer("basis", torch.zeros(config.feature_dim, config.latent_dim))

    def project(self, features: Tensor) -> Tensor:
        """Targets of features (B, N, D): (B, N, C), on the sphere, float32.

        Raises:
            ValueError: the width is not config.feature_dim.
        """
        _check_width(features, self.config.feature_dim)
        with full_precision(features):
            return _tokens_to_sphere((features.float() - self.mean) @ self.basis)


def fit_pca(features: Iterable[Tensor], latent_dim: int) -> LinearTargets:
    """Raw targets by principal components, from one pass over a stream of features.

    Sums are in float64 and relative to the mean of the first batch, so that long streams and offsets of the
    features lose no precision. The largest entry of each component is positive, so that equal features give
    equal targets on every machine, up to rounding.

    Args:
        features: batches of H_vfm, (..., D) each, such as (B, N, D).
        latent_dim: channels C.

    Raises:
        ValueError: the stream has at most C tokens, its width changes, or C is larger than D.
    """
    count, offset, total, scatter = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for batch in features:
        rows = batch.detach().double().flatten(0, -2)
        if count == 0:
            offset = rows.mean(dim=0)
            total, scatter = torch.zeros_like(offset), torch.zeros_like(offset).diag()
        _check_width(rows, len(offset))
        rows = rows - offset
        count += len(rows)
        total += rows.sum(dim=0)
        scatter += rows.mT @ rows
    if count <= latent_dim:
        raise ValueError(f"{latent_dim} principal components need more than {latent_dim} tokens, got {count}")
    targets = LinearTargets(
        LinearTargetsConfig(projection="pca", feature_dim=len(offset), latent_dim=latent_dim)
    ).to(offset.device)
    shift = total / count
    _, directions = torch.linalg.eigh(scatter / count - shift.outer(shift))  # variances ascending
    basis = directions.flip(1)[:, :latent_dim]
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    targets.mean.copy_(offset + shift)
    targets.basis.copy_(basis * largest.sign())
    return targets


def random_targets(feature_dim: int, latent_dim: int, seed: int = 0) -> LinearTargets:
    """Raw targets by a random projection: an orthonormal basis of the random subspace of a seed.

    Raises:
        ValueError: C is larger than D.
    """
    targets = LinearTargets(
        LinearTargetsConfig(projection="random", feature_dim=feature_dim, latent_dim=latent_dim)
    )
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(feature_dim, latent_dim, generator=generator, dtype=torch.float64)
    targets.basis.copy_(torch.linalg.qr(normal)[0])
    return targets


class FrozenPrior(nn.Module):
    """A trained refiner, or raw targets, as a frozen `Prior` without gradient.

    Args:
        targets: the projection of the features. It is set to evaluation mode and frozen.
    """

    def __init__(self, targets: Refiner | LinearTargets) -> None:
        super().__init__()
        self.targets = targets.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def latent_dim(self) -> int:
        """Channels C of the targets."""
        return self.targets.config.latent_dim

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """features H_vfm: (B, N, D). Returns targets: (B, N, C), on the sphere."""
        return self.targets.project(features)


def _tokens_to_sphere(tokens: Tensor) -> Tensor:
    """The sphere norm of tokens (B, N, C)."""
    return to_sphere(tokens.mT[..., None])[..., 0].mT


def _check_width(features: Tensor, width: int) -> None:
    if features.shape[-1] != width:
        raise ValueError(f"features must have the width D = {width}, got {tuple(features.shape)}")
