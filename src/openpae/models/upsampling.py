"""H_ref of the prior refinement (Sec. 3.3): features whose layout follows the image.

H_ref = down(low_pass(upsample(H_vfm, image)))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.configs import LowPassConfig
from openpae.models.layers import to_grid, to_tokens
from openpae.models.vfms import IMAGENET_MEAN, IMAGENET_STD

FeatureUpsampler = Callable[[Tensor, Tensor], Tensor]
"""(image (1, 3, H, W), normalised as for ImageNet; features (1, D, h, w)) -> features (1, D, H, W)."""

# AnyUp (arXiv:2510.12764): code and weights under CC BY 4.0. The commit pins the code that we reviewed.
ANYUP = "wimmerth/anyup:099432746871214b2732890da86ba02b94a1a59b"
ANYUP_WEIGHTS = "https://github.com/wimmerth/anyup/releases/download/checkpoint/anyup_paper.pth"

_CELL_REACH, _COLOUR_REACH, _WINDOW = 1.0, 0.1, 2.0  # of joint bilateral upsampling, see bilateral_weights
_CHUNK = 2**24  # numbers per chunk of joint bilateral upsampling: 64 MiB, of which a few exist at once


@torch.no_grad()
def reference_features(
    features: Tensor,
    images: Tensor,
    h: int,
    w: int,
    upsampler: Literal["bilinear", "jbu"] | FeatureUpsampler,
    low_pass: LowPassConfig | None = None,
) -> Tensor:
    """H_ref, features whose layout follows the image; Gram(Z_T) is to match Gram(H_ref) (Sec. 3.3).

        H_ref = down(low_pass(upsample(H_vfm, x)))

    Low-pass and down are one small matrix per axis, see `low_pass_down`. The upsamplers "bilinear" and "jbu"
    are linear in the features too. They are multiplied with these matrices first, so that no H x W map of D
    channels is computed. Another upsampler runs image by image.

    Args:
        features: H_vfm, (B, h w, D), constant.
        images: in [0, 1], (B, 3, H, W), not smaller than h x w.
        h: rows of the latent grid and of the features.
        w: columns of the same.
        upsampler: "bilinear" (ignores the images), "jbu" (`bilateral_weights`, without training), or a
            network such as `load_anyup` returns.
        low_pass: None: the defaults.

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
    with full_precision(features):
        rows, columns = _passes(((height, h), (width, w)), low_pass, features)
        if upsampler == "bilinear":
            # The passes act on upsampled maps, so each is multiplied by the upsampling.
            rows = [part @ _bilinear(h, height, features) for part in rows]
            columns = [part @ _bilinear(w, width, features) for part in columns]
            return _normalised(to_tokens(_pass_down(grid, rows, columns)), low_pass)
        if upsampler == "jbu":
            return _normalised(_bilateral_mixing(images.float(), h, w, rows, columns) @ features, low_pass)
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
        return _normalised(to_tokens(torch.cat(downs)), low_pass)


def low_pass_down(maps: Tensor, h: int, w: int, low_pass: LowPassConfig) -> Tensor:
    """Low-pass at full resolution, then bilinear sampling at the latent grid.

        blend         D ((1 - s) X + s B X),   B a Gaussian blur, D bilinear sampling at the cells' centres
        subtract      D (X - s B X)
        spatial-norm  (Y - s mean Y) / std Y,   Y = D X, mean and standard deviation over the places

    Both are separable and linear, so D and D B are one matrix per axis. The blur is renormalised at the
    border, where a part of the Gaussian has no pixels.

    Args:
        maps: X, (B, D, H, W).
        h: rows of the grid.
        w: columns of the grid.
        low_pass: kind, s, and the width of B.

    Returns:
        (B, D, h, w), float32.
    """
    with full_precision(maps):
        sizes = ((maps.shape[-2], h), (maps.shape[-1], w))
        down = _pass_down(maps.float(), *_passes(sizes, low_pass, maps))
        return to_grid(_normalised(to_tokens(down), low_pass), h, w)


def bilateral_weights(images: Tensor, h: int, w: int, rows: slice) -> Tensor:
    """Weights of joint bilateral upsampling (Kopf et al. 2007): the share of each cell in a pixel.

        W_pq ~ exp(-|p - q|^2 / 2 s^2) exp(-|x_p - x_q|^2 / 2 v^2),   sum_q W_pq = 1

    over cells q at most 2 cells from pixel p along either axis; x_q is the mean colour of cell q. A pixel
    takes its features from near cells of similar colour. Our choice: s = 1 cell, the reach of bilinear
    interpolation, and v = 0.1 of the range of the image, as is common for bilateral filters.

    Args:
        images: in [0, 1], (B, 3, H, W).
        h: rows of the grid of cells.
        w: columns of the grid.
        rows: rows of pixels to compute; the weights of 256 x 256 pixels on 16 x 16 cells take 64 MiB.

    Returns:
        (B, rows, W, h w), float32.
    """
    images = images.float()
    cells = to_tokens(F.adaptive_avg_pool2d(images, (h, w)))  # (B, N, 3)
    pixels = images[:, :, rows].permute(0, 2, 3, 1)  # (B, rows, W, 3)
    near = [_log_nearness(*size, images) for size in ((images.shape[2], h), (images.shape[3], w))]
    place = near[0][rows, None, :, None] + near[1][None, :, None, :]  # (rows, W, h, w)
    # |x_p - x_q|^2 without |x_p|^2, which cancels in the softmax over q.
    unlike = cells.square().sum(dim=-1)[:, None, None] - 2 * pixels @ cells.mT[:, None]
    return (place.flatten(2) - unlike / (2 * _COLOUR_REACH**2)).softmax(dim=-1)


def load_anyup() -> nn.Module:
    """AnyUp (arXiv:2510.12764), a frozen upsampler for `reference_features`, from torch hub.

    It runs code of github.com/wimmerth/anyup (CC BY 4.0) at a pinned commit, and downloads its weights
    (CC BY 4.0). Later calls use the cache of torch hub, also without a network.

    Raises:
        FileNotFoundError: code or weights cannot be downloaded.
    """
    try:
        # skip_validation: otherwise torch hub looks for a branch with the name of the commit.
        network: nn.Module = torch.hub.load(  # type: ignore[no-untyped-call]
            ANYUP, "anyup", pretrained=False, trust_repo=True, skip_validation=True, verbose=False
        )
        # Not by the loader of AnyUp, which unpickles the complete file.
        weights = torch.hub.load_state_dict_from_url(
            ANYUP_WEIGHTS, map_location="cpu", weights_only=True, progress=False
        )
    except OSError as error:
        raise FileNotFoundError(
            f"AnyUp cannot be had from {ANYUP.split(':')[0]} ({error}); connect once so that torch hub can "
            f"cache it in {torch.hub.get_dir()}, or take upsampler jbu, which needs no weights"
        ) from None
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def _passes(
    sizes: tuple[tuple[int, int], tuple[int, int]], low_pass: LowPassConfig, like: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """D and D B of rows and of columns, (cells, pixels) each, for (pixels, cells) of both axes.

    Their weights are 1 - s and s for "blend", 1 and -s for "subtract". Rows and columns have the root of a
    weight each, and the columns its sign.
    """
    plain = 1 - low_pass.strength if low_pass.kind == "blend" else 1.0
    sign = -1 if low_pass.kind == "subtract" else 1
    axes = []
    for pixels, cells in sizes:
        down = _bilinear(pixels, cells, like)
        at = torch.arange(pixels, device=like.device) * (cells / pixels)
        blur = torch.exp(-((at[:, None] - at) ** 2) / (2 * low_pass.sigma**2))
        blur = blur / blur.sum(dim=1, keepdim=True)
        axes.append([math.sqrt(plain) * down, math.sqrt(low_pass.strength) * down @ blur])
    rows, columns = axes
    if low_pass.kind == "spatial-norm":
        return rows[:1], columns[:1]
    return rows, [columns[0], sign * columns[1]]


def _normalised(tokens: Tensor, low_pass: LowPassConfig) -> Tensor:
    """The spatial norm of tokens (B, N, D), if it is the kind of the low-pass; 1e-6 beside the variance."""
    if low_pass.kind != "spatial-norm":
        return tokens
    variance, mean = torch.var_mean(tokens, dim=1, correction=0, keepdim=True)
    return (tokens - low_pass.strength * mean) * torch.rsqrt(variance + 1e-6)


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


def full_precision(like: Tensor) -> torch.autocast:
    """Disable autocast: products of statistics stay in float32."""
    return torch.autocast(like.device.type, enabled=False)
