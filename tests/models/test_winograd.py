"""Tiles of Winograd's convolution compute what the direct convolution computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models import winograd
from openpae.models.winograd import FrozenConvReLU

# float32 has 6e-8. The transforms raise an error by at most (10 x 1 x 19)^2, the products of their largest
# row sums; errors of both signs stay far below. A wrong entry of a transform gives errors above a hundredth.
ROUNDING = 1e-4


def convolution(inputs: int = 128, outputs: int = 8, kernel: int = 3) -> FrozenConvReLU:
    torch.manual_seed(0)
    conv = FrozenConvReLU(inputs, outputs, kernel, 1, kernel // 2)
    return conv.requires_grad_(False)


def images(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def distance(a: Tensor, b: Tensor) -> float:
    return (torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double())).item()


def tiles_of(conv: FrozenConvReLU, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the tiled convolution runs in one pass."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(FrozenConvReLU, "_products", lambda conv: calls.append(conv) or products(conv))
        conv(x)
    return len(calls)


products = FrozenConvReLU._products


# One image; several in a block; more than a block of images, of rows; rows that do not fill the last block.
@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 32, 16), (9, 16, 16), (2, 64, 36), (1, 8, 520)])
def test_values_and_gradients_are_those_of_the_direct_convolution(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, x = convolution(), images(shape[0], 128, *shape[1:])
    assert tiles_of(conv, x, monkeypatch) == 1
    x.requires_grad_()
    y = conv(x)
    weight, bias = conv.weight.double(), conv.bias.double()  # type: ignore[union-attr]
    expected = F.conv2d(x.detach().double(), weight, bias, padding=1).relu()
    assert distance(y.detach(), expected) < ROUNDING
    gradient = images(*y.shape)
    y.backward(gradient)
    masked = gradient.double() * (y.detach() > 0)
    assert x.grad is not None
    assert distance(x.grad, F.conv_transpose2d(masked, weight, padding=1)) < ROUNDING


def test_a_gradient_in_another_layout_gives_the_same_bits() -> None:
    conv, x = convolution(), images(2, 128, 16, 16).requires_grad_()
    gradient = images(2, 8, 16, 16)
    (one,) = torch.autograd.grad(conv(x), x, gradient)
    (two,) = torch.autograd.grad(conv(x), x, gradient.contiguous())
    assert torch.equal(one, two)
    summed = torch.autograd.grad(conv(x).sum(), x)[0]  # an expanded gradient, all strides 0
    assert torch.equal(summed, torch.autograd.grad(conv(x), x, torch.ones_like(gradient))[0])


@pytest.mark.parametrize(
    ("inputs", "kernel", "size"),
    [(128, 3, (18, 16)), (128, 3, (12, 20)), (64, 3, (16, 16)), (128, 5, (16, 16))],
)
def test_everything_else_is_the_direct_convolution(
    inputs: int, kernel: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, x = convolution(inputs, kernel=kernel), images(2, inputs, *size)
    assert tiles_of(conv, x, monkeypatch) == 0
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=kernel // 2).relu())


def test_other_precisions_are_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = convolution(), images(2, 128, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiles_of(conv, x, monkeypatch) == 0
        assert conv(x).dtype == torch.bfloat16
    assert tiles_of(conv.double(), x.double(), monkeypatch) == 0


def test_new_weights_are_used() -> None:
    conv, other, x = convolution(), convolution(), images(1, 128, 16, 16)
    nn.init.normal_(other.weight)
    before = conv(x)
    conv.load_state_dict(other.state_dict())
    assert not torch.equal(conv(x), before)
    assert torch.equal(conv(x), other(x))
    conv.bfloat16().float()  # may move to the address of the kernel before
    assert torch.equal(conv(x), other.bfloat16().float()(x))
    conv.weight = nn.Parameter(other.weight.clone().zero_(), requires_grad=False)
    assert torch.equal(conv(x), conv.bias.relu().view(1, -1, 1, 1).expand(1, 8, 16, 16))  # type: ignore[union-attr]


def test_kernels_first_used_without_gradients_serve_with_them() -> None:
    conv, x = convolution(), images(1, 128, 16, 16)
    with torch.inference_mode():
        expected = conv(x)
    y = conv(x.clone().requires_grad_())
    y.sum().backward()
    assert torch.equal(y.detach(), expected.clone())


def test_blocks_cover_each_tile_once() -> None:
    for images_, rows, columns in [(1, 1, 1), (9, 4, 4), (2, 16, 9), (1, 2, 130), (3, 40, 40)]:
        seen = torch.zeros(1, 1, images_, rows, columns)
        for block in winograd._blocks(images_, rows, columns):
            seen[block] += 1
        assert (seen == 1).all()
