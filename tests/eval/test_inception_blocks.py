"""The pools of the Inception network of 2015, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.eval.inception import Inception2015, MixedA, MixedB, MixedC, MixedD, MixedE


def mean3(x: Tensor) -> Tensor:
    """The mean over 3 x 3 pixels, of those alone that lie in the image, as TensorFlow pads."""
    weight = torch.ones(1, 1, 3, 3)
    sums = F.conv2d(x.flatten(0, 1)[:, None], weight, padding=1)[:, 0].view_as(x)
    return sums / F.conv2d(torch.ones_like(x[:1, :1]), weight, padding=1)


def largest3(x: Tensor) -> Tensor:
    """The largest of 3 x 3 pixels."""
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3)
    return windows.view(len(x), x.shape[1], 9, -1).amax(dim=2).view_as(x)


def randomised(block: nn.Module) -> nn.Module:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    return block.eval()


@pytest.mark.parametrize(
    ("block", "width", "pool"),
    [
        (MixedA(192, 32), 192, mean3),
        (MixedC(128), 768, mean3),
        (MixedE(1280, max_pool=False), 1280, mean3),
        (MixedE(2048, max_pool=True), 2048, largest3),
    ],
    ids=["A", "C", "E", "last E"],
)
def test_the_last_branch_pools_its_input(block: nn.Module, width: int, pool: object) -> None:
    assert callable(pool)
    x = torch.randn(2, width, 5, 5)
    with torch.no_grad():
        out = randomised(block)(x)
        branch = block.get_submodule("branch_pool")(pool(x))
    torch.testing.assert_close(out[:, -branch.shape[1] :], branch, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [MixedB(288), MixedD()], ids=["B", "D"])
def test_a_reduction_takes_the_largest_of_every_second_window(block: nn.Module) -> None:
    width = 288 if isinstance(block, MixedB) else 768
    x = torch.randn(2, width, 7, 7)
    with torch.no_grad():
        out = randomised(block)(x)
    assert torch.equal(out[:, -width:], largest3(x)[:, :, 1::2, 1::2])


def test_the_network_ends_in_a_maximum_and_has_means_before() -> None:
    network = Inception2015()
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            nn.init.kaiming_normal_(value)
        elif name.endswith("bn.weight"):
            value.fill_(1)
    inputs: dict[str, Tensor] = {}
    pooled: dict[str, Tensor] = {}
    for name, block in network.named_children():
        if name.startswith("Mixed") and name not in ("Mixed_6a", "Mixed_7a"):
            block.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
            branch = block.get_submodule("branch_pool")
            branch.register_forward_pre_hook(lambda _, args, name=name: pooled.update({name: args[0]}))
    network(torch.randint(0, 256, (1, 3, 64, 64)).float())
    assert len(pooled) == 9
    for name, x in inputs.items():
        expected = largest3(x) if name == "Mixed_7c" else mean3(x)
        torch.testing.assert_close(pooled[name], expected, rtol=1e-4, atol=1e-4, msg=name)


def test_batch_norms_have_tensorflows_epsilon() -> None:
    norms = [part for part in Inception2015().modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == 94
    assert {norm.eps for norm in norms} == {0.001}
