"""Initial weights under which each token attends to itself."""

from __future__ import annotations

import torch

from openpae.models.layers import SelfAttention, start_at_self


def test_queries_and_keys_are_one_rotation_times_the_gain() -> None:
    """W_q = W_k, and W_q W_q^T = gain^2 I."""
    for gain in (2.0, 3.0):
        attention = SelfAttention(16, 2, qkv_bias=False)
        start_at_self(attention, gain)
        queries, keys, _ = attention.qkv.weight.detach().chunk(3)
        assert torch.equal(queries, keys)
        torch.testing.assert_close(queries @ queries.T, gain**2 * torch.eye(16), rtol=1e-5, atol=1e-5)


def test_the_gain_is_two_unless_said() -> None:
    attention = SelfAttention(16, 2, qkv_bias=False)
    start_at_self(attention)
    queries = attention.qkv.weight.detach()[:16]
    torch.testing.assert_close(queries @ queries.T, 4 * torch.eye(16), rtol=1e-5, atol=1e-5)
