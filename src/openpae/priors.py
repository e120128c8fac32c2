"""Stage (a): what the latent is aligned with, the VFM's features refined and compressed (Sec. 3.3).

    Z_T = P_t(H_vfm),   H^ = Q_t(Z_T),   H_ref = down(low_pass(upsample(H_vfm, image)))

The refiner (P_t, Q_t) learns to keep the features and the Gram matrix of H_ref; afterwards Z_T is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.encoders import IMAGENET_MEAN, IMAGENET_STD
from openpae.layers import TransformerBlock, init_vit, sincos_2d, to_grid, to_sphere, to_tokens

FeatureUpsampler = Callable[[Tensor, Tensor], Tensor]
"""(image (1, 3, H, W), normalised as for ImageNet; features (1, D, h, w)) -> features (1, D, H, W)."""

# AnyUp (arXiv:2510.12764): code and weights under CC BY 4.0. A commit, so that the code is the one we read.
ANYUP = "wimmerth/anyup:099432746871214b2732890da86ba02b94a1a59b"
ANYUP_WEIGHTS = "https://github.com/wimmerth/anyup/releases/download/checkpoint/anyup_paper.pth"

_CELL_REACH, _COLOUR_REACH, _WINDOW = 1.0, 0.1, 2.0  # of joint bilateral upsampling, see bilateral_weights
_CHUNK = 2**24  # numbers that joint bilateral upsampling holds at once: 64 MiB, a few of which live together


class Prior(Protocol):
    """Gives the targets of SSR and SCR; any callable of this shape can be passed."""

    def __call__(self, features: Tensor) -> Tensor:
        """Targets (B, N, C) of features H_vfm (B, N, D), on the sphere, without gradient."""
        ...


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """A refiner. The defaults are for DINOv2-L; the decoder's sizes are the paper's."""

    feature_dim: int = 1024
    """Width D of the VFM's features."""
    latent_dim: int = 32
    """Channels C of the targets: those of the tokenizer's latent."""
    grid_size: int = 16
    """Side of the token grid, h = w: that of the tokenizer's latent."""
    num_heads: int = 16
    """Attention heads of P_t: those of the VFM."""
    decoder_layers: int = 4
    """Transformer blocks of Q_t."""
    decoder_dim: int = 1024
    """Width of Q_t."""
    decoder_heads: int = 16
    """Attention heads of Q_t."""

    def __post_init__(self) -> None:
        for name in ("feature_dim", "latent_dim", "grid_size", "decoder_layers", "decoder_dim"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name, width in (("num_heads", self.feature_dim), ("decoder_heads", self.decoder_dim)):
            if (heads := getattr(self, name)) < 1 or width % heads:
                raise ValueError(f"{name} must divide the width {width}, got {heads}")
        if self.decoder_dim % 4:
            raise ValueError(f"decoder_dim must be a multiple of 4 for its positions, got {self.decoder_dim}")


class TargetProjector(nn.Module):
    """P_t: one transformer block on the features, a linear layer D -> C, the sphere norm.

    Our choice: the paper says only that P_t compresses. The block's residual hands the features on, so that
    the linear layer can start as a projection of them; no positions, since the features carry their own.
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
        width, side = config.decoder_dim, config.grid_size
        self.embed = nn.Linear(config.latent_dim, width)
        self.register_buffer("positions", sincos_2d(side, side, width)[None], persistent=False)
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
    """P_t and Q_t, trained together; afterwards only P_t is used, see `FrozenPrior`.

    Args:
        config: its sizes.
    """

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = TargetProjector(config.feature_dim, config.latent_dim, config.num_heads)
        self.decoder = FeatureDecoder(config)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What training compares, in one pass (a distributed wrapper sees only this one).

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
            ValueError: not the N tokens or the C channels of the config.
        """
        expected = (self.config.grid_size**2, self.config.latent_dim)
        if tuple(prior.shape[1:]) != expected:
            raise ValueError(f"prior must be (B, N, C) with (N, C) = {expected}, got {tuple(prior.shape)}")
        features: Tensor = self.decoder(prior)
        return features


@dataclass(frozen=True, kw_only=True)
class LinearTargetsConfig:
    """A fixed linear map of the features: the raw targets of Table 2(b)."""

    kind: Literal["pca", "random"] = "pca"
    """How the map was found."""
    feature_dim: int = 1024
    """Width D of the VFM's features."""
    latent_dim: int = 32
    """Channels C of the targets."""

    def __post_init__(self) -> None:
        if not 1 <= self.latent_dim <= self.feature_dim:
            raise ValueError(
                f"latent_dim must lie in [1, feature_dim = {self.feature_dim}], got {self.latent_dim}"
            )


class LinearTargets(nn.Module):
    """Raw targets: z_i = sphere(U^T (h_i - m)), no refinement (Table 2b).

    The columns of U are orthonormal. For "pca" they are the first C principal directions of the features and
    m is their mean: of all linear maps the one whose inner products are nearest to those of the centred
    features. No whitening, which would undo that. For "random" they span a random subspace, and m is 0.

    Args:
        config: its sizes. The map itself starts as zeros; `fit_pca` and `random_targets` make filled ones.
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
        with _full_precision(features):
            return _tokens_to_sphere((features.float() - self.mean) @ self.basis)


def fit_pca(features: Iterable[Tensor], latent_dim: int) -> LinearTargets:
    """Raw targets by principal components, from one pass over a stream of features.

    Sums are kept in float64 and taken about the mean of the first batch, so neither the length of the stream
    nor an offset of the features costs digits. The sign of a component is free; here its largest entry is
    positive, so that equal features give equal targets on every machine, up to rounding.

    Args:
        features: batches of H_vfm, (..., D) each, such as (B, N, D).
        latent_dim: channels C.

    Raises:
        ValueError: the stream holds no more than C tokens, its width changes, or C is larger than D.
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
        LinearTargetsConfig(kind="pca", feature_dim=len(offset), latent_dim=latent_dim)
    ).to(offset.device)
    shift = total / count
    _, directions = torch.linalg.eigh(scatter / count - shift.outer(shift))  # variances ascending
    basis = directions.flip(1)[:, :latent_dim]
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    targets.mean.copy_(offset + shift)
    targets.basis.copy_(basis * largest.sign())
    return targets


def random_targets(feature_dim: int, latent_dim: int, seed: int = 0) -> LinearTargets:
    """Raw targets by a random projection: an orthonormal basis of a random subspace, the same for a seed.

    Raises:
        ValueError: C is larger than D.
    """
    targets = LinearTargets(
        LinearTargetsConfig(kind="random", feature_dim=feature_dim, latent_dim=latent_dim)
    )
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(feature_dim, latent_dim, generator=generator, dtype=torch.float64)
    targets.basis.copy_(torch.linalg.qr(normal)[0])
    return targets


class FrozenPrior(nn.Module):
    """A trained refiner, or raw targets, as a `Prior`: never changes, gives no gradient.

    Args:
        targets: what projects the features. It is set to evaluation mode and frozen.
    """

    def __init__(self, targets: Refiner | LinearTargets) -> None:
        super().__init__()
        self.targets = targets.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @property
    def latent_dim(self) -> int:
        """Channels C of the targets."""
        return self.targets.config.latent_dim

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """features H_vfm: (B, N, D). Returns targets: (B, N, C), on the sphere."""
        return self.targets.project(features)


@dataclass(frozen=True, kw_only=True)
class LowPassConfig:
    """The low-pass between upsampling and the latent grid: (1 - s) H + s blur(H).

    Our choice: the paper says "low-pass" and "spatial normalisation, strength 0.4" (docs/deviations.md).
    """

    strength: float = 0.4
    """Share s of the blurred features; 0 has no low-pass."""
    sigma: float = 0.5
    """Standard deviation of the Gaussian, in cells of the latent grid. Half a cell leaves 29 % of the
    amplitude at the grid's Nyquist frequency, and 0.7 % at twice that, where sampling sees a constant."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"low_pass.strength must lie in [0, 1] (0 has no low-pass), got {self.strength}")
        if self.sigma <= 0:
            raise ValueError(f"low_pass.sigma must be > 0 cells, got {self.sigma}")


@torch.no_grad()
def reference_features(
    features: Tensor,
    images: Tensor,
    h: int,
    w: int,
    upsampler: Literal["bilinear", "jbu"] | FeatureUpsampler,
    low_pass: LowPassConfig | None = None,
) -> Tensor:
    """The features with their layout taken from the image: what Gram(Z_T) is to match (Sec. 3.3).

        H_ref = down(low_pass(upsample(H_vfm, x)))

    H x W maps of all D channels never exist for a batch. Low-pass and down are one small matrix per axis, see
    `low_pass_down`. The upsamplers "bilinear" and "jbu" are linear in the features too: they meet these
    matrices first, and what touches the D channels is one matrix of N x N per image. Another upsampler is
    called image by image.

    Args:
        features: H_vfm, (B, h w, D), constant.
        images: in [0, 1], (B, 3, H, W), not smaller than h x w.
        h: rows of the latent grid, and of the features'.
        w: its columns.
        upsampler: "bilinear" (looks at no image), "jbu" (`bilateral_weights`, training-free), or a network
            such as `load_anyup` gives.
        low_pass: None takes the defaults.

    Returns:
        H_ref, (B, h w, D), float32, without gradient.

    Raises:
        ValueError: features, images and grid do not fit each other, or an unknown upsampler.
    """
    _check_reference(features, images, h, w)
    low_pass = low_pass or LowPassConfig()
    height, width = images.shape[-2:]
    features = features.float()
    grid = to_grid(features, h, w)
    with _full_precision(features):
        rows, columns = (_passes(*size, low_pass, features) for size in ((height, h), (width, w)))
        if upsampler == "bilinear":
            # The passes read the upsampled maps; here each also upsamples.
            rows = [part @ _bilinear(h, height, features) for part in rows]
            columns = [part @ _bilinear(w, width, features) for part in columns]
            return to_tokens(_pass_down(grid, rows, columns))
        if upsampler == "jbu":
            return _bilateral_mixing(images.float(), h, w, rows, columns) @ features
        if isinstance(upsampler, str):
            raise ValueError(
                f"upsampler must be 'bilinear', 'jbu' or a network (load_anyup()), got {upsampler!r}"
            )
        mean, std = (features.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        guides = (images.float() - mean) / std
        downs = [
            _pass_down(upsampler(guides[i : i + 1], grid[i : i + 1]).float(), rows, columns)
            for i in range(len(images))
        ]
        return to_tokens(torch.cat(downs))


def low_pass_down(maps: Tensor, h: int, w: int, low_pass: LowPassConfig) -> Tensor:
    """Low-pass at full resolution, then bilinear sampling at the latent grid.

        D ((1 - s) X + s B X),   B a Gaussian blur, D bilinear sampling at the centres of the cells

    Both are separable and linear, so D and D B are applied as one matrix per axis. The blur renormalises at
    the border, where part of the Gaussian has no pixels.

    Args:
        maps: X, (B, D, H, W).
        h: rows of the grid.
        w: its columns.
        low_pass: s, and the width of B.

    Returns:
        (B, D, h, w), float32.
    """
    with _full_precision(maps):
        sizes = ((maps.shape[-2], h), (maps.shape[-1], w))
        return _pass_down(maps.float(), *(_passes(*size, low_pass, maps) for size in sizes))


def bilateral_weights(images: Tensor, h: int, w: int, rows: slice) -> Tensor:
    """Weights of joint bilateral upsampling (Kopf et al. 2007): which cells a pixel is made of.

        W_pq ~ exp(-|p - q|^2 / 2 s^2) exp(-|x_p - x_q|^2 / 2 v^2),   sum_q W_pq = 1

    over cells q at most 2 cells from pixel p along either axis; x_q is the mean colour of cell q. A pixel so
    takes its features from near cells of its own colour. Our choice: s = 1 cell, the reach of bilinear
    interpolation, and v = 0.1 of the range of the image, as is common for bilateral filters.

    Args:
        images: in [0, 1], (B, 3, H, W).
        h: rows of the grid of cells.
        w: its columns.
        rows: the rows of pixels that are wanted; the weights of 256 x 256 pixels on 16 x 16 cells are 64 MiB.

    Returns:
        (B, rows, W, h w), float32.
    """
    images = images.float()
    cells = to_tokens(F.adaptive_avg_pool2d(images, (h, w)))  # (B, N, 3)
    pixels = images[:, :, rows].permute(0, 2, 3, 1)  # (B, rows, W, 3)
    near = [_log_nearness(*size, images) for size in ((images.shape[2], h), (images.shape[3], w))]
    place = near[0][rows, None, :, None] + near[1][None, :, None, :]  # (rows, W, h, w)
    # |x_p - x_q|^2 without |x_p|^2, which no softmax over q sees.
    unlike = cells.square().sum(dim=-1)[:, None, None] - 2 * pixels @ cells.mT[:, None]
    return (place.flatten(2) - unlike / (2 * _COLOUR_REACH**2)).softmax(dim=-1)


def load_anyup() -> nn.Module:
    """AnyUp (arXiv:2510.12764), a frozen upsampler for `reference_features`, from torch hub.

    It runs code of github.com/wimmerth/anyup (CC BY 4.0), at the commit that we read, and downloads its
    weights (CC BY 4.0), once: torch hub's cache serves later calls, without a network too.

    Raises:
        FileNotFoundError: code or weights can not be had.
    """
    try:
        # skip_validation: torch hub accepts a commit only so; otherwise it looks for a branch of that name.
        network: nn.Module = torch.hub.load(  # type: ignore[no-untyped-call]
            ANYUP, "anyup", pretrained=False, trust_repo=True, skip_validation=True, verbose=False
        )
        # Not by its own loader, which unpickles whatever the file holds.
        weights = torch.hub.load_state_dict_from_url(
            ANYUP_WEIGHTS, map_location="cpu", weights_only=True, progress=False
        )
    except OSError as error:
        raise FileNotFoundError(
            f"AnyUp can not be had from {ANYUP.split(':')[0]} ({error}); connect once so that torch hub can "
            f"cache it in {torch.hub.get_dir()}, or take upsampler jbu, which needs no weights"
        ) from None
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def _passes(pixels: int, cells: int, low_pass: LowPassConfig, like: Tensor) -> list[Tensor]:
    """sqrt(1 - s) D and sqrt(s) D B of one axis, (cells, pixels) each: rows and columns bring a root each."""
    down = _bilinear(pixels, cells, like)
    at = torch.arange(pixels, device=like.device) * (cells / pixels)
    blur = torch.exp(-((at[:, None] - at) ** 2) / (2 * low_pass.sigma**2))
    blur = blur / blur.sum(dim=1, keepdim=True)
    return [math.sqrt(1 - low_pass.strength) * down, math.sqrt(low_pass.strength) * down @ blur]


def _pass_down(maps: Tensor, rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Maps (B, D, H, W) through the passes of both axes: (B, D, h, w)."""
    return torch.stack([r @ (maps @ c.mT) for r, c in zip(rows, columns, strict=True)]).sum(dim=0)


def _bilateral_mixing(images: Tensor, h: int, w: int, rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """down . low_pass . W of `bilateral_weights` W, as one matrix of cells by cells: (B, N, N)."""
    count, _, height, width = images.shape
    mixing = images.new_zeros(count, h, w, h * w)
    step = max(1, _CHUNK // (count * width * h * w))
    for start in range(0, height, step):
        part = slice(start, start + step)
        weights = bilateral_weights(images, h, w, part)
        for r, c in zip(rows, columns, strict=True):
            mixing += torch.einsum("ir,brjn->bijn", r[:, part], c @ weights)
    return mixing.flatten(1, 2)


def _bilinear(old: int, new: int, like: Tensor) -> Tensor:
    """Bilinear resampling of `old` samples to `new` ones along one axis, as a matrix (new, old)."""
    eye = torch.eye(old, device=like.device)[None]
    return F.interpolate(eye, size=new, mode="linear", align_corners=False)[0].mT


def _log_nearness(pixels: int, cells: int, like: Tensor) -> Tensor:
    """-d^2 / 2 s^2 between pixels and cells along one axis, (pixels, cells); -inf outside of the window."""
    at = (torch.arange(pixels, device=like.device) + 0.5) * (cells / pixels) - 0.5
    distance = at[:, None] - torch.arange(cells, device=like.device)
    return (-(distance**2) / (2 * _CELL_REACH**2)).masked_fill(distance.abs() > _WINDOW, -math.inf)


def _tokens_to_sphere(tokens: Tensor) -> Tensor:
    """The sphere norm of tokens (B, N, C)."""
    return to_sphere(tokens.mT[..., None])[..., 0].mT


def _full_precision(like: Tensor) -> torch.autocast:
    """Products in float32 under bf16 autocast too: targets are statistics, not activations."""
    return torch.autocast(like.device.type, enabled=False)


def _check_width(features: Tensor, width: int) -> None:
    if features.shape[-1] != width:
        raise ValueError(f"features must have the width D = {width}, got {tuple(features.shape)}")


def _check_reference(features: Tensor, images: Tensor, h: int, w: int) -> None:
    if features.ndim != 3 or features.shape[:2] != (len(images), h * w):
        raise ValueError(
            f"features must be (B, N, D) with B = {len(images)} images and N = h w = {h * w} tokens, "
            f"got {tuple(features.shape)}"
        )
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] < h or images.shape[3] < w:
        raise ValueError(
            f"images must be (B, 3, H, W), not smaller than the grid of {h} x {w}, got {tuple(images.shape)}"
        )
