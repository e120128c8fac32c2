"""The tracker counts what lives, by kind, and operations as formulas give them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from openpae.plan.memory import Tracker

KIB = 2**10


def test_bytes_follow_a_tensor_from_its_making_to_its_end() -> None:
    with FakeTensorMode() as mode, Tracker(mode) as tracker:
        a = torch.empty(KIB)  # float32
        view = a[:10]
        assert tracker.total == 4 * KIB  # a view has no memory of its own
        b = torch.empty(3)
        assert tracker.total == 4 * KIB + 512  # the smallest block
        tracker.mark("weights", [b])
        assert tracker.in_use["weights"] == 512
        assert tracker.in_use["activations"] == 4 * KIB
        del a
        assert tracker.total == 4 * KIB + 512  # the view holds it
        del view, b
        assert tracker.total == 0
        assert tracker.peak.total == 4 * KIB + 512


def test_a_storage_that_is_emptied_past_the_dispatcher_counts_no_more() -> None:
    with FakeTensorMode() as mode, Tracker(mode) as tracker:
        a = torch.empty(KIB)
        a.untyped_storage().resize_(0)
        assert tracker.total == 0
        a.untyped_storage().resize_(4 * KIB)
        assert tracker.total == 4 * KIB
    assert torch.empty(4).untyped_storage().resize_(64).nbytes() == 64  # the method is PyTorch's own again


@pytest.mark.parametrize("again", [False, True])
def test_the_peak_of_a_chain_is_that_of_theory(again: bool) -> None:
    """Four sines of 4 KiB keep one input each; checkpointed, only that of the chain is kept."""

    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin().sin().sin().sin()

    chain = Chain()
    with FakeTensorMode() as mode, Tracker(mode) as tracker:
        tracker.name("chain", chain)
        x = torch.empty(KIB, requires_grad=True)
        y = checkpoint(chain, x, use_reentrant=False) if again else chain(x)
        assert tracker.total == (2 if again else 5) * 4 * KIB
        tracker.reset()
        y.sum().backward()
        assert tracker.peak.at == "chain, backward"


def test_products_are_counted_by_type_and_pass() -> None:
    n, m, k = 8, 16, 32
    with FakeTensorMode() as mode, Tracker(mode) as tracker:
        x, w = torch.empty(n, m, requires_grad=True), torch.empty(m, k, requires_grad=True)
        (x @ w).sum().backward()
        assert tracker.operations == {torch.float32: 3 * 2 * n * m * k}
        tracker.reset()
        with torch.autocast("cpu", torch.bfloat16):
            x @ w
        assert tracker.operations == {torch.bfloat16: 2 * n * m * k}


def test_attention_costs_two_products_and_five_backward() -> None:
    batch, heads, tokens, width = 2, 3, 8, 16
    with FakeTensorMode() as mode, Tracker(mode) as tracker:
        q = torch.empty(batch, heads, tokens, width, requires_grad=True)
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        product = 2 * batch * heads * tokens * tokens * width
        assert tracker.operations == {torch.float32: 7 * product}
