"""A step computes frozen features and spectral norms once for both losses."""

import pytest
import torch
from torch import Tensor

from openpae.models.discriminator import SpectralConv2d, frozen, norms_once
from tests.models.test_discriminator import BOTH, Make


@BOTH
def test_known_features_give_the_same_logits(make: Make) -> None:
    net, images = make(), torch.rand(2, 3, 16, 16)
    seen = net.get_submodule("").features(images)  # type: ignore[operator]
    assert torch.equal(net(seen), net(images))


@BOTH
def test_inside_norms_once_each_power_iteration_runs_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logits to the bit; behind the block a norm follows its weights again, whoever changed them."""
    net, images = make().train(), torch.rand(2, 3, 16, 16)
    convs = [part for part in net.modules() if isinstance(part, SpectralConv2d)]
    expected, runs = net(images), []
    iterate = SpectralConv2d._singular_vectors

    def counted(conv: SpectralConv2d, matrix: Tensor) -> tuple[Tensor, Tensor]:
        runs.append(conv)
        return iterate(conv, matrix)

    monkeypatch.setattr(SpectralConv2d, "_singular_vectors", counted)
    with norms_once(net):
        with frozen(net):
            assert torch.equal(net(images), expected)
        assert torch.equal(net(images), expected)
    assert len(runs) == len(convs)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, fused=True)
    before = [conv.sigma() for conv in convs]
    expected.sum().backward()
    optimizer.step()
    assert not any(torch.equal(conv.sigma(), sigma) for conv, sigma in zip(convs, before, strict=True))
