"""A frozen 3x3 convolution with ReLU that needs a quarter of the products on a CPU (arXiv:1509.09308)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CHANNELS = 128
"""Fewest input channels for tiles; below, the transforms cost what the products save."""
_PIXELS = 256
"""Pixels of the smallest map for tiles; below, reading the larger kernels costs more than the products."""
_BLOCK = 128
"""Tiles of a block, so that what one step of it writes is in the cache for the next."""

# The 1-D transforms of F(4, 3): interpolation at 0, 1, -1, 2, -2 and infinity.
_KERNEL = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))  # times 24
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class FrozenConvReLU(nn.Conv2d):
    """Convolution and ReLU, for weights without gradient: (B, C, H, W) to (B, O, H', W').

        y = max(0, w * x + b)

    On a CPU in float32, a 3x3 convolution with padding 1 computes each tile of 4 x 4 pixels in Winograd's
    way, F(4 x 4, 3 x 3): 36 products a pair of channels instead of 144. The result differs from the direct
    one by rounding (docs/deviations.md). Kernels are then kept a second time, transformed, at four times
    their size. Everything else runs as `nn.Conv2d`: other kernels and devices, autocast, compiled code and
    fake tensors, maps of less than 16 x 16 pixels or with sides that 4 does not divide.
    """

    _kept: tuple[Tensor, int, Tensor] | None = None
    """The kernel, its version and the transformed kernel. Holding it keeps its address from other tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Gradients flow to it once, not to gradients of gradients."""
        if not self._in_tiles(x):
            return super().forward(x).relu()
        y: Tensor = _TiledConvReLU.apply(x.movedim(1, -1), self._products(), self.bias)  # type: ignore[no-untyped-call]
        return y.movedim(-1, 1)

    def _in_tiles(self, x: Tensor) -> bool:
        w = self.weight
        fits = (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
        plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == w.dtype == torch.float32
        traced = w.is_inference() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        height, width = x.shape[-2:]
        large = self.in_channels >= _CHANNELS and height * width >= _PIXELS
        return fits and plain and not traced and large and height % 4 == width % 4 == 0

    def _products(self) -> Tensor:
        """The transformed kernel, (36, C, O), as long as the weights are the same tensor."""
        weight, version = self.weight.detach(), self.weight._version
        if self._kept is None or (self._kept[0].data_ptr(), self._kept[1]) != (weight.data_ptr(), version):
            with torch.inference_mode(False), torch.no_grad():
                g = torch.tensor(_KERNEL, dtype=torch.float64) / 24
                u = torch.einsum("ia,ocab,jb->ijco", g, weight.double(), g).flatten(0, 1)
                self._kept = weight, version, u.float().contiguous()
        return self._kept[2]


class _TiledConvReLU(torch.autograd.Function):
    """Per tile: Y = A (sum_c (B x_c) . U_c), 2-D transforms A and B as matrices on the flattened tile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, bias: Tensor) -> Tensor:
        """x: (B, H, W, C), u: (36, C, O), bias: (O,). Returns (B, H, W, O)."""
        b, h, w, _ = x.shape
        to_products, to_pixels = _squared(_INPUT), _squared(_OUTPUT)
        windows = _windows(F.pad(x, (0, 0, 1, 1, 1, 1)), range(6), range(6))
        out = x.new_empty(b, h, w, u.shape[2])
        tiles = _windows(out, range(4), range(4))
        for block in _blocks(b, h // 4, w // 4):
            patches = windows[block].contiguous()
            products = torch.bmm((to_products @ patches.view(36, -1)).view(36, -1, u.shape[1]), u)
            pixels = to_pixels @ products.view(36, -1)
            pixels.view(-1, u.shape[2]).add_(bias).relu_()
            tiles[block] = pixels.view(tiles[block].shape)
        ctx.save_for_backward(out, u)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Each step of `forward` transposed, in reverse; windows overlap, so their gradients add up."""
        out, u = ctx.saved_tensors
        b, h, w, _ = out.shape
        to_patches, to_products = _squared(_INPUT).mT, _squared(_OUTPUT).mT
        gradients, tiles = (_windows(t, range(4), range(4)) for t in (gradient, out))
        padded = out.new_zeros(b, h + 2, w + 2, u.shape[1])
        # Within one of these four, windows of neighbouring tiles do not overlap.
        parts = list(product((range(4), range(4, 6)), repeat=2))
        targets = [_windows(padded, *part) for part in parts]
        for block in _blocks(b, h // 4, w // 4):
            pixels = (gradients[block] * (tiles[block] > 0)).contiguous()
            products = (to_products @ pixels.view(16, -1)).view(36, -1, u.shape[2])
            patches = to_patches @ torch.bmm(products, u.mT).view(36, -1)
            patches = patches.view(6, 6, *pixels.shape[2:5], u.shape[1])
            for target, (rows, columns) in zip(targets, parts, strict=True):
                target[block] += patches[rows.start : rows.stop, columns.start : columns.stop]
        return padded[:, 1:-1, 1:-1], None, None


def _squared(rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """A 1-D transform as the 2-D one of a flattened tile."""
    matrix = torch.tensor(rows, dtype=torch.float32)
    return torch.kron(matrix, matrix)


def _windows(x: Tensor, rows: range, columns: range) -> Tensor:
    """A view (rows, columns, B, H // 4, W // 4, C) of x (B, H, W, C): for each tile of 4 x 4 pixels, those of
    these rows and columns, counted from its first."""
    b, h, w, c = x.shape
    image, row, column, channel = x.stride()
    return x.as_strided(
        (len(rows), len(columns), b, h // 4, w // 4, c),
        (row, column, image, 4 * row, 4 * column, channel),
        x.storage_offset() + rows.start * row + columns.start * column,
    )


def _blocks(images: int, rows: int, columns: int) -> Iterator[tuple[slice, ...]]:
    """Slices of `_windows` with about `_BLOCK` tiles each: several images, or rows of one."""
    count = max(1, _BLOCK // (rows * columns))
    per = min(rows, max(1, _BLOCK // columns))
    for first, row in product(range(0, images, count), range(0, rows, per)):
        yield slice(None), slice(None), slice(first, first + count), slice(row, row + per)
