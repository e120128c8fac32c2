"""LPIPS, a frozen perceptual distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from openpae.models.configs import LPIPSNet
from openpae.models.winograd import FrozenConvReLU

# LPIPS reads the output of each stage. A stage is a list of convolutions (out, kernel, stride, padding), each
# with a ReLU. POOLED: stages, counted from 0 as in the published heads, that begin with max pooling (stride
# 2).
STAGES: dict[str, tuple[tuple[tuple[int, int, int, int], ...], ...]] = {
    "vgg": (
        ((64, 3, 1, 1),) * 2,
        ((128, 3, 1, 1),) * 2,
        ((256, 3, 1, 1),) * 3,
        ((512, 3, 1, 1),) * 3,
        ((512, 3, 1, 1),) * 3,
    ),
    "alex": (
        ((64, 11, 4, 2),),
        ((192, 5, 1, 2),),
        ((384, 3, 1, 1),),
        ((256, 3, 1, 1),),
        ((256, 3, 1, 1),),
    ),
}
POOLED = {"vgg": (1, 2, 3, 4), "alex": (1, 2)}
_POOL_KERNEL = {"vgg": 2, "alex": 3}
_SMALLEST = {"vgg": 16, "alex": 31}  # the side with one full window in the last pooling layer


_BLOCK = 2**17
"""Numbers of a block of `_UnitLength`."""


class LPIPS(nn.Module):
    """Learned perceptual distance of two images (Zhang et al., arXiv:1801.03924, version 0.1).

        d(a, b) = sum_l mean_hw sum_c w_lc (a_lc - b_lc)^2

    a_l is the output of stage l of an ImageNet classifier, scaled to unit length over the channels of each
    pixel. The network is frozen: gradients reach only the images. It starts with random weights; `load_lpips`
    loads the published ones.

    For several distances of one image, compute its `features` once and pass them to `distance`. Detach them
    where a distance treats them as constant.

    Args:
        net: "vgg" (VGG16, for losses) or "alex" (AlexNet, for metrics).

    Raises:
        ValueError: net is neither.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: LPIPSNet) -> None:
        super().__init__()
        if net not in STAGES:
            raise ValueError(f"net must be one of {', '.join(map(repr, sorted(STAGES)))}, got {net!r}")
        self.net = net
        # The published scaling layer, (2 x - 1 - shift) / scale, written as a mean and std on [0, 1].
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("mean", ((1 + shift) / 2).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", (scale / 2).view(1, 3, 1, 1), persistent=False)
        self.stages = nn.ModuleList()
        self.heads = nn.ParameterList()
        width = 3
        for index, convs in enumerate(STAGES[net]):
            stage = nn.Sequential()
            if index in POOLED[net]:
                stage.add_module("pool", nn.MaxPool2d(_POOL_KERNEL[net], stride=2))
            for number, (out, kernel, stride, padding) in enumerate(convs, start=1):
                stage.add_module(f"conv{number}", FrozenConvReLU(width, out, kernel, stride, padding))
                width = out
            self.stages.append(stage)
            self.heads.append(nn.Parameter(torch.empty(width)))
        self.reset_parameters()
        self.eval().requires_grad_(False)
        # Channels last: features take 20 to 30 % less time on a CPU, as no layer reorders its input.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def reset_parameters(self) -> None:
        """Draw random weights: features keep their scale over the depth, heads weight channels equally."""
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for head in self.heads:
            nn.init.constant_(head, 1 / head.numel())

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances of pairs of images in [0, 1], (B, 3, H, W) each: (B,), >= 0, 0 for equal images.

        Raises:
            ValueError: a and b differ in shape, or are not images of an allowed size; see `features`.
        """
        if a.shape != b.shape:
            raise ValueError(f"LPIPS compares images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
        return self.distance(self.features(a), self.features(b))

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of unit length at each pixel, one (B, C_l, h_l, w_l) per stage, float32.

        Args:
            images: (B, 3, H, W) in [0, 1]. Gradients flow to these.

        Raises:
            ValueError: not (B, 3, H, W), or a side below 16 ("vgg") or 31 ("alex").
        """
        return [_to_unit_length(activation) for activation in self._activations(images)]

    def distance(self, fa: Sequence[Tensor], fb: Sequence[Tensor]) -> Tensor:
        """The LPIPS distance of images from their `features`: (B,), float32.

        Raises:
            ValueError: the features are not of images of one batch size and shape.
        """
        if [f.shape for f in fa] != [f.shape for f in fb] or len(fa) != len(self.heads):
            raise ValueError(
                f"distance needs two outputs of features() for images of one shape, got maps of "
                f"{[tuple(f.shape) for f in fa]} and {[tuple(f.shape) for f in fb]}"
            )
        terms = []
        for a, b, head in zip(fa, fb, self.heads, strict=True):
            # Sum over pixels first, then over channels: one fused pass over the large maps. The gradient of a
            # mean would be written at full size, and memory traffic is half of the cost on a CPU.
            per_channel = F.mse_loss(a, b, reduction="none").sum(dim=(2, 3))  # (B, C_l)
            terms.append((per_channel * head).sum(dim=1) / a[0, 0].numel())
        return torch.stack(terms).sum(dim=0)

    def deep_features(self, images: Tensor) -> Tensor:
        """The last stage averaged over the image, >= 0: (B, 512) for "vgg" (relu5_3), (B, 256) for "alex".

        A feature extractor for Frechet distances without the Inception network; such distances are not
        comparable with published FIDs. Images and errors as in `features`.
        """
        return self._activations(images)[-1].float().mean(dim=(2, 3))

    def _activations(self, images: Tensor) -> list[Tensor]:
        smallest = _SMALLEST[self.net]
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < smallest:
            raise ValueError(
                f"LPIPS ({self.net}) needs images (B, 3, H, W) with H and W >= {smallest}, "
                f"got {tuple(images.shape)}"
            )
        x = (images.float() - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        activations = []
        for stage in self.stages:
            x = stage(x)
            activations.append(x)
        return activations


def _to_unit_length(x: Tensor) -> Tensor:
    """x / (|x| + 1e-10) over the channels of each pixel, (B, C, H, W)."""
    x = x.float()
    if type(x) is Tensor and x.device.type == "cpu":
        y: Tensor = _UnitLength.apply(x)  # type: ignore[no-untyped-call]
        return y
    return x * _inverse_length(x)


def _inverse_length(x: Tensor) -> Tensor:
    # vector_norm, not the root of a sum: its gradient is 0 instead of NaN where all channels are 0.
    inverse: Tensor = 1 / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
    return inverse


class _UnitLength(torch.autograd.Function):
    """`_to_unit_length` on a CPU: its gradient (g - y (y . g)) / |x| is computed in blocks that stay in the
    cache. Autograd's own would write several maps of full size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = _inverse_length(x)
        ctx.save_for_backward(x, inverse)  # not y: the stage keeps x in any case
        return x * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, inverse = ctx.saved_tensors
        out: Tensor = torch.empty_like(x, memory_format=torch.channels_last)  # so that `flatten` is a view
        pixels = (t.movedim(1, -1).flatten(0, 2) for t in (gradient, x, inverse, out))
        blocks = (t.split(max(1, _BLOCK // x.shape[1])) for t in pixels)
        for g, values, scale, result in zip(*blocks, strict=True):
            unit = values * scale
            along = (g * unit).sum(dim=-1, keepdim=True)
            torch.addcmul(g, unit, along, value=-1, out=result).mul_(scale)
        return out
