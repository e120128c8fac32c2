"""The Inception network of 2015 for FID, with the TensorFlow arithmetic of published numbers.

Modules have the names of the converted weights (pt_inception-2015-12-05), so that their file loads unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 299


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Resize as in TensorFlow 1 (`resize_bilinear` with align_corners=False): (B, C, size, size).

        out[i] = x[l] + (x[u] - x[l]) (i s - l),   s = in / out,  l = floor(i s),  u = min(l + 1, in - 1)

    It has no half-pixel centres and no low-pass. Published FID uses it.

    Args:
        images: (B, C, H, W), any range.
        size: side of the result.
    """
    rows, next_rows, down = _sources(images.shape[-2], size, images.device)
    columns, next_columns, right = _sources(images.shape[-1], size, images.device)
    top, bottom = images[:, :, rows], images[:, :, next_rows]
    top = top[..., columns] + (top[..., next_columns] - top[..., columns]) * right
    bottom = bottom[..., columns] + (bottom[..., next_columns] - bottom[..., columns]) * right
    return top + (bottom - top) * down[:, None]


def _sources(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output pixel of one axis: its two source pixels, and the weight of the second."""
    scale = torch.tensor(length, dtype=torch.float32) / size
    position = torch.arange(size, dtype=torch.float32) * scale  # float32 as in the TensorFlow kernel
    lower = position.long()
    upper = (lower + 1).clamp(max=length - 1)
    return lower.to(device), upper.to(device), (position - lower).to(device)


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_dim, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_dim, h, w). Returns (B, out_dim, h', w')."""
        return F.relu(self.bn(self.conv(x)))


def _average3(x: Tensor) -> Tensor:
    # TensorFlow does not count the padding.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class MixedA(nn.Module):
    """Blocks 5b to 5d, on a 35 x 35 grid."""

    def __init__(self, in_dim: int, pool_dim: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNormRelu(in_dim, 64, 1)
        self.branch5x5_1 = ConvNormRelu(in_dim, 48, 1)
        self.branch5x5_2 = ConvNormRelu(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNormRelu(in_dim, 64, 1)
        self.branch3x3dbl_2 = ConvNormRelu(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormRelu(96, 96, 3, padding=1)
        self.branch_pool = ConvNormRelu(in_dim, pool_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_dim, 35, 35). Returns (B, 224 + pool_dim, 35, 35)."""
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_average3(x))], dim=1)


class MixedB(nn.Module):
    """Block 6a: 35 x 35 to 17 x 17."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNormRelu(in_dim, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNormRelu(in_dim, 64, 1)
        self.branch3x3dbl_2 = ConvNormRelu(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormRelu(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_dim, 35, 35). Returns (B, 480 + in_dim, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedC(nn.Module):
    """Blocks 6b to 6e, on a 17 x 17 grid; 7 x 7 kernels as pairs of 1 x 7 and 7 x 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        along, across = (0, 3), (3, 0)  # paddings
        self.branch1x1 = ConvNormRelu(768, 192, 1)
        self.branch7x7_1 = ConvNormRelu(768, dim, 1)
        self.branch7x7_2 = ConvNormRelu(dim, dim, (1, 7), padding=along)
        self.branch7x7_3 = ConvNormRelu(dim, 192, (7, 1), padding=across)
        self.branch7x7dbl_1 = ConvNormRelu(768, dim, 1)
        self.branch7x7dbl_2 = ConvNormRelu(dim, dim, (7, 1), padding=across)
        self.branch7x7dbl_3 = ConvNormRelu(dim, dim, (1, 7), padding=along)
        self.branch7x7dbl_4 = ConvNormRelu(dim, dim, (7, 1), padding=across)
        self.branch7x7dbl_5 = ConvNormRelu(dim, 192, (1, 7), padding=along)
        self.branch_pool = ConvNormRelu(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 768, 17, 17). Returns the same shape."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average3(x))], dim=1)


class MixedD(nn.Module):
    """Block 7a: 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNormRelu(768, 192, 1)
        self.branch3x3_2 = ConvNormRelu(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNormRelu(768, 192, 1)
        self.branch7x7x3_2 = ConvNormRelu(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNormRelu(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNormRelu(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 768, 17, 17). Returns (B, 1280, 8, 8)."""
        small = self.branch3x3_2(self.branch3x3_1(x))
        large = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([small, large, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedE(nn.Module):
    """Blocks 7b and 7c, on an 8 x 8 grid.

    Args:
        in_dim: input channels.
        max_pool: take the maximum in the pooling branch; the network of 2015 does so in its last block only.
    """

    def __init__(self, in_dim: int, *, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvNormRelu(in_dim, 320, 1)
        self.branch3x3_1 = ConvNormRelu(in_dim, 384, 1)
        self.branch3x3_2a = ConvNormRelu(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNormRelu(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNormRelu(in_dim, 448, 1)
        self.branch3x3dbl_2 = ConvNormRelu(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNormRelu(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNormRelu(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNormRelu(in_dim, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_dim, 8, 8). Returns (B, 2048, 8, 8)."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average3(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            dim=1,
        )


class Inception2015(nn.Module):
    """Inception v3 of the TensorFlow graph of 2015-12-05: 1,008 classes, in evaluation mode, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormRelu(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormRelu(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormRelu(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormRelu(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormRelu(80, 192, 3)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(128)
        self.Mixed_6c = MixedC(160)
        self.Mixed_6d = MixedC(160)
        self.Mixed_6e = MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b = MixedE(1280, max_pool=False)
        self.Mixed_7c = MixedE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features, spatial features and logits of pixels (B, 3, H, W) in [0, 255], any size.

        Returns:
            pool_3 (B, 2048); the first 7 channels of mixed_6/conv, (B, 17 * 17 * 7) with channels last, as in
            the ADM evaluator; logits (B, 1008) without the bias, as for the Inception Score.
        """
        x = (resize_bilinear_tf1(pixels.float(), IMAGE_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, F.linear(pooled, self.fc.weight)
