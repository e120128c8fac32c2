"""LightningDiT: zero at the start, every label and position counts, statistics travel with it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from openpae.models.configs import SIZES, LightningDiTConfig
from openpae.models.dit import Attention, LightningDiT, SwiGLU
from openpae.models.layers import rope_2d
from tests.conftest import shaken


def test_the_untrained_velocity_is_zero(tiny_dit_config: LightningDiTConfig) -> None:
    model = LightningDiT(tiny_dit_config)
    x = torch.randn(3, *tiny_dit_config.latent_shape)
    assert not model(x, torch.rand(3), torch.tensor([0, 1, 2])).any()


def test_untrained_blocks_are_the_identity(tiny_dit_config: LightningDiTConfig) -> None:
    model = LightningDiT(tiny_dit_config)
    x, c = torch.randn(2, 16, 32), torch.randn(2, 1, 32)
    for block in model.blocks:
        assert torch.equal(block(x, c, model.rope_cos, model.rope_sin), x)


def test_class_time_and_place_change_the_velocity(tiny_dit: LightningDiT) -> None:
    x = torch.randn(1, *tiny_dit.config.latent_shape)
    x = x.expand(3, -1, -1, -1)
    by_class = tiny_dit(x, torch.full((3,), 0.5), torch.tensor([0, 1, tiny_dit.null_label]))
    by_time = tiny_dit(x, torch.tensor([0.0, 0.5, 1.0]), torch.zeros(3, dtype=torch.long))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (by_class[a] - by_class[b]).abs().max() > 1e-3
        assert (by_time[a] - by_time[b]).abs().max() > 1e-3
    moved = tiny_dit(x[:1].roll(1, dims=-1), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long))
    still = by_time[1:2].roll(1, dims=-1)
    assert (moved - still).abs().max() > 1e-3  # positions differ


def test_samples_of_a_batch_do_not_meet(tiny_dit: LightningDiT) -> None:
    x, t = torch.randn(3, *tiny_dit.config.latent_shape), torch.rand(3)
    labels = torch.tensor([0, 1, 2])
    together = tiny_dit(x, t, labels)
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], tiny_dit(x[i : i + 1], t[i : i + 1], labels[i : i + 1])
        )


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_reach_every_weight(tiny_dit_config: LightningDiTConfig, patch: int, qk_norm: bool) -> None:
    model = shaken(LightningDiT(replace(tiny_dit_config, patch_size=patch, qk_norm=qk_norm)))
    x = torch.randn(3, *tiny_dit_config.latent_shape)
    out = model(x, torch.rand(3), torch.arange(3))
    assert out.shape == x.shape
    out.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_normed_queries_and_keys_forget_their_scale() -> None:
    """With QK-norm, attention does not sharpen when queries and keys grow."""
    x, (cos, sin) = torch.randn(1, 16, 32), rope_2d(4, 4, 16)
    for qk_norm in (False, True):
        attention = Attention(32, 2, qk_norm=qk_norm)
        before = attention(x, cos, sin)
        with torch.no_grad():
            attention.qkv.weight[:64] *= 10
            attention.qkv.bias[:64] *= 10
        assert torch.allclose(attention(x, cos, sin), before, atol=1e-5) == qk_norm


def test_swiglu_is_its_formula() -> None:
    layer, x = SwiGLU(6, 10), torch.randn(2, 6)
    w1, w2 = layer.w12.weight.chunk(2)
    b1, b2 = layer.w12.bias.chunk(2)
    gate = x @ w1.T + b1
    torch.testing.assert_close(layer(x), layer.w3(gate * gate.sigmoid() * (x @ w2.T + b2)))


def test_the_paper_s_hidden_width_of_swiglu() -> None:
    with torch.device("meta"):
        model = LightningDiT(replace(LightningDiTConfig(), num_layers=1))
    assert model.get_submodule("blocks.0.mlp.w3").in_features == 3072


def test_normalising_and_its_inverse(tiny_dit: LightningDiT) -> None:
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    tiny_dit.set_statistics(mean, std)
    z = torch.randn(5, 8, 4, 4) * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    x = tiny_dit.normalise(z)
    torch.testing.assert_close(x[:, 3], (z[:, 3] - mean[3]) / std[3])
    torch.testing.assert_close(tiny_dit.denormalise(x), z)
    assert tiny_dit.normalise(z.bfloat16()).dtype == torch.float32
    before = z.clone()
    assert torch.equal(tiny_dit.normalise(z), (z - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    assert torch.equal(z, before)  # in place, but not in that of its input
    other = LightningDiT(tiny_dit.config)
    other.load_state_dict(tiny_dit.state_dict())
    assert torch.equal(other.normalise(z), x)  # they travel with the weights


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(1), torch.ones(1), r"must be \(8,\), got \(1,\) and \(1,\)"),
        (torch.zeros(8), torch.ones(1), r"must be \(8,\), got \(8,\) and \(1,\)"),
        (torch.zeros(8), torch.tensor([1.0] * 7 + [0.0]), "a latent channel that never varies"),
        (torch.full((8,), torch.nan), torch.ones(8), "statistics must be finite"),
    ],
)
def test_statistics_that_would_ruin_every_latent_are_refused(
    tiny_dit: LightningDiT, mean: torch.Tensor, std: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dit.set_statistics(mean, std)
    assert (tiny_dit.latent_std == 1).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_half_precision_changes_little(tiny_dit_config: LightningDiTConfig, qk_norm: bool) -> None:
    tiny_dit = shaken(LightningDiT(replace(tiny_dit_config, qk_norm=qk_norm))).eval()
    x, t, labels = torch.randn(3, 8, 4, 4), torch.rand(3), torch.arange(3)
    exact = tiny_dit(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        low = tiny_dit(x, t, labels)
    assert nn.functional.cosine_similarity(low.float().flatten(1), exact.flatten(1)).min() > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide grid_size, got 3 and 4"),
        ({"patch_size": 0}, "patch_size must be >= 1, got 0"),
        ({"num_heads": 5}, "got 5 heads for a width of 32"),
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"class_dropout": 1.5}, r"class_dropout must lie in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_sizes_are_named(
    tiny_dit_config: LightningDiTConfig, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiny_dit_config, **changes)


def test_an_unknown_size_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown size 'xxl'; known: s, b, l, xl, 1p0b, 1p6b"):
        LightningDiTConfig.of_size("xxl")


def by_formula(config: LightningDiTConfig) -> int:
    """Parameters counted by hand, layer by layer."""
    d, c, k = config.hidden_dim, config.latent_dim * config.patch_size**2, config.num_classes + 1
    hidden = 8 * d // 3
    attention = 3 * d * d + 3 * d + d * d + d + (2 * d // config.num_heads if config.qk_norm else 0)
    mlp = 2 * (d * hidden + hidden) + hidden * d + d
    block = attention + mlp + 2 * d + 6 * d * d + 6 * d
    ends = (c * d + d) + (256 * d + d + d * d + d) + k * d + (d + 2 * d * d + 2 * d) + (d * c + c)
    return config.num_layers * block + ends


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize(
    ("size", "millions"),
    [("s", 33), ("b", 130), ("l", 458), ("xl", 675), ("1p0b", 1028), ("1p6b", 1632)],
)
def test_every_size_has_its_parameters(size: str, millions: int, patch_size: int, qk_norm: bool) -> None:
    """675 M is the paper's count of XL/1; 1p0B and 1p6B are named for theirs."""
    config = LightningDiTConfig.of_size(size, patch_size=patch_size, qk_norm=qk_norm)
    with torch.device("meta"):
        model = LightningDiT(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == by_formula(config)
    assert count / 1e6 == pytest.approx(millions, rel=0.005)
    assert set(SIZES) == {"s", "b", "l", "xl", "1p0b", "1p6b"}


def gradients(model: LightningDiT) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x, t = torch.randn(3, *model.config.latent_shape), torch.rand(3)
    model.zero_grad()
    model(x, t, torch.arange(3)).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_checkpointed_blocks_change_no_bit_of_a_gradient(tiny_dit: LightningDiT, blocks: int) -> None:
    plain = gradients(tiny_dit)
    tiny_dit.checkpoint_blocks = blocks
    again = gradients(tiny_dit)
    assert plain.keys() == again.keys() == dict(tiny_dit.named_parameters()).keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_checkpointed_blocks_keep_less(tiny_dit_config: LightningDiTConfig) -> None:
    """Memory held for the backward pass shrinks with every block, and only where gradients are enabled."""
    model = shaken(LightningDiT(replace(tiny_dit_config, num_layers=4)))
    x, t, labels = torch.randn(3, *tiny_dit_config.latent_shape), torch.rand(3), torch.arange(3)

    def kept(blocks: int) -> int:
        sizes: list[int] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        model.checkpoint_blocks = blocks
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(x, t, labels)
        return sum(sizes)

    counts = [kept(blocks) for blocks in range(5)]
    assert counts == sorted(counts, reverse=True)
    steps = [before - after for before, after in itertools.pairwise(counts)]
    assert len(set(steps)) == 1  # the same for every block
    assert steps[0] > 0.2 * counts[0]
    with torch.no_grad():
        assert kept(4) == kept(0) == 0
