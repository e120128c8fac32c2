"""Small parts: inverses, norms, positions, attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openpae.models.layers import (
    CrossAttention,
    SelfAttention,
    TransformerBlock,
    attend,
    init_vit,
    resize_positions,
    rope_2d,
    rotate,
    sincos_1d,
    sincos_2d,
    timestep_features,
    to_grid,
    to_sphere,
    to_tokens,
    unpatchify,
)

sides = st.integers(1, 5)


@given(h=sides, w=sides)
def test_tokens_and_grid_are_inverse(h: int, w: int) -> None:
    tokens = torch.randn(2, h * w, 3)
    grid = to_grid(tokens, h, w)
    assert torch.equal(to_tokens(grid), tokens)
    assert torch.equal(grid[1, :, h - 1, w - 1], tokens[1, -1])
    assert torch.equal(grid[0, :, 0, w - 1], tokens[0, w - 1])  # row order: a row is w tokens


@given(h=sides, w=sides, patch=st.integers(1, 4))
def test_unpatchify_undoes_cutting_into_patches(h: int, w: int, patch: int) -> None:
    images = torch.randn(2, 3, h * patch, w * patch)
    patches = torch.stack(
        [
            images[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            .permute(0, 2, 3, 1)
            .flatten(1)
            for r in range(h)
            for c in range(w)
        ],
        dim=1,
    )
    assert torch.equal(unpatchify(patches, h, w, patch), images)


def test_sphere_gives_every_token_unit_rms_at_every_scale() -> None:
    z = torch.randn(2, 8, 3, 5) * torch.logspace(0, 3, 15).view(1, 1, 3, 5)
    on = to_sphere(z)
    torch.testing.assert_close(on.square().mean(1), torch.ones(2, 3, 5), rtol=1e-4, atol=0)
    torch.testing.assert_close(to_sphere(7 * z), on, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_sphere(on), on, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on, z / (z.square().mean(1, keepdim=True) + 1e-6).sqrt())


def test_sphere_per_sample_keeps_the_proportions_of_tokens() -> None:
    z = torch.randn(2, 8, 3, 5)
    on = to_sphere(z, "sample")
    torch.testing.assert_close(on.square().mean((1, 2, 3)), torch.ones(2), rtol=1e-4, atol=0)
    ratio = (on / z).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_sphere_of_nothing_is_nothing_and_has_a_gradient() -> None:
    z = torch.zeros(1, 8, 2, 2, requires_grad=True)
    on = to_sphere(z)
    assert not on.any()
    on.sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_sphere_computes_in_float32_under_autocast() -> None:
    z = torch.randn(1, 8, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        low, exact = to_sphere(z.bfloat16()), to_sphere(z)
    assert low.dtype == exact.dtype == torch.float32
    assert torch.equal(exact, to_sphere(z))


@given(h=sides, w=sides)
def test_sincos_gives_every_place_its_own_code_of_one_length(h: int, w: int) -> None:
    positions = sincos_2d(h, w, 16)
    torch.testing.assert_close(positions.square().sum(1), torch.full((h * w,), 8.0))
    distances = torch.cdist(positions, positions) + torch.eye(h * w)
    assert distances.min() > 0.1


def test_sincos_puts_the_column_in_front() -> None:
    positions = to_grid(sincos_2d(3, 4, 16)[None], 3, 4)[0]  # (16, 3, 4)
    assert torch.equal(positions[:8, 0], positions[:8, 2])  # one column, another row
    assert torch.equal(positions[8:, :, 0], positions[8:, :, 3])
    assert not torch.equal(positions[8:, 0], positions[8:, 2])


def test_positions_are_resized_only_if_they_must() -> None:
    positions = sincos_2d(4, 4, 16)[None]
    assert resize_positions(positions, (4, 4), 4, 4) is positions
    assert resize_positions(positions, (4, 4), 2, 6).shape == (1, 12, 16)
    # A position that does not depend on the place still does not.
    constant = torch.ones(1, 16, 4)
    torch.testing.assert_close(resize_positions(constant, (4, 4), 2, 6), torch.ones(1, 12, 4))


@pytest.mark.parametrize(
    ("trained", "grid"), [((16, 16), (32, 32)), ((16, 16), (16, 24)), ((6, 10), (12, 20))]
)
def test_positions_of_another_grid_are_those_of_the_places_between(
    trained: tuple[int, int], grid: tuple[int, int]
) -> None:
    """Cell i of n lies where a resized image has it; away from the edge, where a cubic has no neighbours,
    the interpolated table is the sine or cosine there. Also of grids that are not square."""
    resized = to_grid(resize_positions(sincos_2d(*trained, 16)[None], trained, *grid), *grid)[0]
    rows, columns = (
        (torch.arange(n, dtype=torch.float64) + 0.5) * old / n - 0.5
        for old, n in zip(trained, grid, strict=True)
    )
    exact = torch.cat(
        [
            sincos_1d(columns.repeat(len(rows)), 8),
            sincos_1d(rows.repeat_interleave(len(columns)), 8),
        ],
        dim=1,
    )
    inner = resized[:, 3:-3, 3:-3]
    torch.testing.assert_close(inner, to_grid(exact[None], *grid)[0][:, 3:-3, 3:-3], atol=0.06, rtol=0)


def test_rotary_positions_of_another_grid_spread_over_the_trained_range() -> None:
    for computed, expected in zip(rope_2d(4, 6, 16, (4, 6)), rope_2d(4, 6, 16), strict=True):
        assert torch.equal(computed, expected)
    cos, _ = rope_2d(8, 3, 16, (4, 6))
    rows, columns = (torch.arange(8) + 0.5) / 2 - 0.5, (torch.arange(3) + 0.5) * 2 - 0.5
    # The fastest pair of each half turns by one radian a cell.
    torch.testing.assert_close(cos.view(8, 3, 16)[:, 0, 0], rows.cos())
    torch.testing.assert_close(cos.view(8, 3, 16)[0, :, 8], columns.cos())


def scores(q: Tensor, k: Tensor, h: int, w: int) -> Tensor:
    """Attention scores of one query and key vector at every pair of places: (h, w, h, w)."""
    cos, sin = rope_2d(h, w, len(q))
    turned_q, turned_k = (rotate(x.expand(h * w, -1), cos, sin) for x in (q, k))
    return (turned_q @ turned_k.T).view(h, w, h, w)


def test_rotary_scores_depend_on_relative_position_only() -> None:
    """Moving query and key by the same rows and columns changes no score; moving one does."""
    h, w = 5, 6
    s = scores(torch.randn(16, dtype=torch.float64).float(), torch.randn(16), h, w)
    for rows, columns in ((1, 0), (0, 1), (2, 3)):
        moved = s[rows:, columns:, rows:, columns:]
        torch.testing.assert_close(moved, s[: h - rows, : w - columns, : h - rows, : w - columns])
    assert (s[0, 0, 1, 0] - s[0, 0, 0, 1]).abs() > 1e-3  # rows and columns differ
    for along in (s[0, 0, :, 0], s[0, 0, 0, :]):  # and so are the steps along each
        assert along.diff().abs().min() > 1e-4


def test_rotation_keeps_lengths_and_leaves_the_first_place_alone() -> None:
    x = torch.randn(2, 3, 12, 16)
    cos, sin = rope_2d(3, 4, 16)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 0, :], x[..., 0, :])
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_attention_is_softmax_of_scaled_products() -> None:
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    heads = []
    for part in range(2):
        columns = slice(4 * part, 4 * part + 4)
        weights = (q[..., columns] @ k[..., columns].mT / 2).softmax(-1)  # sqrt(4) = 2
        heads.append(weights @ v[..., columns])
    torch.testing.assert_close(attend(q, k, v, 2), torch.cat(heads, dim=-1))


def test_attention_without_positions_sees_a_set() -> None:
    """Permuting tokens permutes the output; permuting the context changes nothing."""
    x, context, order = torch.randn(2, 7, 8), torch.randn(2, 9, 8), torch.randperm(7)
    for model in (SelfAttention(8, 2), TransformerBlock(8, 2, 16, 1e-6)):
        torch.testing.assert_close(model(x[:, order]), model(x)[:, order])
    cross = CrossAttention(8, 2)
    torch.testing.assert_close(cross(x, context[:, torch.randperm(9)]), cross(x, context))
    torch.testing.assert_close(cross(x[:, order], context), cross(x, context)[:, order])


def test_projector_attention_has_no_bias_in_queries_keys_and_values() -> None:
    names = {name for name, _ in SelfAttention(8, 2, qkv_bias=False).named_parameters()}
    assert names == {"qkv.weight", "proj.weight", "proj.bias"}


def test_init_leaves_no_bias_and_treats_a_convolution_as_a_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 8, stride=8), nn.Linear(192, 64), nn.LayerNorm(64))
    init_vit(model)
    conv, linear, norm = model
    assert not conv.bias.any()  # type: ignore[union-attr, operator]
    assert not linear.bias.any()  # type: ignore[union-attr, operator]
    assert (norm.weight == 1).all()  # type: ignore[union-attr]
    bound = (6 / (192 + 64)) ** 0.5
    for weight in (conv.weight, linear.weight):
        assert 0.9 * bound < weight.abs().max() <= bound  # type: ignore[operator]


def test_timestep_features_start_with_cosines() -> None:
    features = timestep_features(torch.tensor([0.0, 1.0]), dim=8)
    assert torch.equal(features[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(features[1], torch.cat([frequencies.cos(), frequencies.sin()]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelfAttention(10, 3), "got 3 heads for a width of 10"),
        (lambda: CrossAttention(10, 0), "got 0 heads for a width of 10"),
        (lambda: sincos_2d(2, 2, 6), "a multiple of 4, got 6"),
        (lambda: rope_2d(2, 2, 6), "a multiple of 4, got 6"),
    ],
)
def test_impossible_widths_are_named(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
