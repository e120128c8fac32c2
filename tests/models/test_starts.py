"""The start `local`: each token attends to itself, and images begin with the spectrum of photographs."""

from __future__ import annotations

import pytest
import torch
from scipy import fft
from torch import nn

from openpae.models.configs import PAEConfig
from openpae.models.layers import SelfAttention, init_vit, unpatchify
from openpae.models.starts import start_at_self, start_local, start_with_spectrum
from openpae.models.tokenizer import build_tokenizer


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


def test_attention_can_start_at_each_token_itself() -> None:
    """A change of one token then changes mostly its own output; otherwise it changes all outputs alike."""
    torch.manual_seed(0)
    tokens = torch.randn(1, 64, 96)
    other = tokens.clone()
    other[0, 5] += torch.randn(96)
    moved = {}
    for start in ("vit", "self"):
        attention = SelfAttention(96, 8, qkv_bias=False)
        init_vit(attention)
        values = attention.qkv.weight[192:].clone()
        if start == "self":
            start_at_self(attention)
        assert torch.equal(attention.qkv.weight[192:], values)
        with torch.no_grad():
            change = (attention(other) - attention(tokens))[0].norm(dim=-1)
        moved[start] = float(change[5] / change.norm())
    assert moved["vit"] < 0.5
    assert moved["self"] > 0.7


def test_pixels_can_start_with_the_spectrum_of_photographs() -> None:
    """Amplitude scale patch / f of each grey cosine, a third of it in colour (by SciPy's DCT)."""
    torch.manual_seed(0)
    patch, width, scale = 8, 64, 0.3
    to_pixels = nn.Linear(width, 3 * patch**2)
    start_with_spectrum(to_pixels, patch, scale)
    with torch.no_grad():
        images = unpatchify(torch.randn(20_000, 1, width) @ to_pixels.weight.T, 1, 1, patch).double().numpy()
    grey, red_green = images.sum(1) / 3**0.5, (images[:, 0] - images[:, 1]) / 2**0.5
    for colour, factor in ((grey, 1), (red_green, 3)):
        amplitude = fft.dctn(colour, axes=(1, 2), norm="ortho").std(axis=0)
        for u, v, frequency in ((0, 0, 1), (0, 1, 1), (2, 0, 2), (3, 4, 5), (7, 7, 98**0.5)):
            assert amplitude[u, v] == pytest.approx(scale * patch / (factor * frequency), rel=0.35)
    assert images.std() < 1  # normalised pixels have a standard deviation of about 1


def test_a_local_start_changes_both_projectors_and_the_pixels_alone(tiny_config: PAEConfig) -> None:
    model = build_tokenizer(tiny_config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    start_local(model)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"projector.attn.qkv.weight", "deprojector.attn.qkv.weight", "decoder.to_pixels.weight"}
