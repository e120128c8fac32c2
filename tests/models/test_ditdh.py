"""DiT-DH: RAE's architecture by an independent derivation, its sizes, and the behaviour shared with
LightningDiT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openpae.models.configs import DiTDHConfig, HeadConfig, LightningDiTConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH, build_generator
from tests.conftest import shaken

TINY = DiTDHConfig(
    latent_dim=12,
    grid_size=4,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_classes=3,
    head=HeadConfig(hidden_dim=48, num_layers=2, num_heads=4),
)
Array = NDArray[np.float64]


@pytest.fixture
def model() -> DiTDH:
    return shaken(DiTDH(TINY)).eval()


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def rms(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def turned(x: Array, side: int) -> Array:
    """Rotary positions by complex numbers: x (heads, N, d); half of a head turns with the row, half with the
    column."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-np.arange(0, half, 2) / half)
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


class Reference:
    """One sample through the weights of a DiT-DH, from RAE's description, in float64 NumPy."""

    def __init__(self, model: DiTDH) -> None:
        self.w = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self.side = model.config.grid_size // model.config.patch_size
        self.positions = model.positions[0].double().numpy()  # tests/test_layers.py derives them

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def block(self, name: str, x: Array, c: Array, heads: int) -> Array:
        parts = np.split(self.linear(f"{name}.modulation", silu(c)), 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        y = rms(x, self.w[f"{name}.norm1.weight"]) * (1 + scale_a) + shift_a
        qkv = self.linear(f"{name}.attn.qkv", y).reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
        q, k, v = turned(qkv[0], self.side), turned(qkv[1], self.side), qkv[2]
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), -1)
        x = x + gate_a * self.linear(f"{name}.attn.proj", mixed)
        y = rms(x, self.w[f"{name}.norm2.weight"]) * (1 + scale_m) + shift_m
        gate, value = np.split(self.linear(f"{name}.mlp.w12", y), 2, axis=-1)
        return np.asarray(x + gate_m * self.linear(f"{name}.mlp.w3", silu(gate) * value))

    def __call__(self, x: Array, level: float, label: int) -> Array:
        """x: (C, h, w); level: RAE's t, 1 = noise. Returns RAE's velocity, noise - data: (C, h, w)."""
        cells = x.reshape(len(x), -1).T  # patch size 1: a token is a cell
        angles = 2 * np.pi * level * self.w["frequencies"]
        time = self.linear("time_mlp.0", np.concatenate([np.sin(angles), np.cos(angles)]))
        time = self.linear("time_mlp.2", silu(time))
        c = silu(time + self.w["class_embed.weight"][label])
        weight = self.w["patch_embed.weight"][:, :, 0, 0]
        s = cells @ weight.T + self.w["patch_embed.bias"] + self.positions
        for number in range(2):
            s = self.block(f"blocks.{number}", s, c, heads=2)
        s = self.linear("to_head", silu(time + s))
        y = cells @ self.w["head_embed.weight"][:, :, 0, 0].T + self.w["head_embed.bias"]
        for number in range(2):
            y = self.block(f"head_blocks.{number}", y, s, heads=4)
        shift, scale = np.split(self.linear("final_modulation", silu(s)), 2, axis=-1)
        y = self.linear("to_velocity", rms(y, self.w["final_norm.weight"]) * (1 + scale) + shift)
        return np.asarray(y.T.reshape(x.shape))


def test_the_model_is_what_rae_describes(model: DiTDH) -> None:
    """Their t is our 1 - t; their velocity points from data to noise, so a release comes in with a minus."""
    x, t, labels = torch.randn(3, *TINY.latent_shape), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 2, 3])
    velocity = model(x, t, labels).detach().double().numpy()
    reference = Reference(model)
    for row in range(3):
        expected = reference(x[row].double().numpy(), 1 - t[row].item(), int(labels[row]))
        np.testing.assert_allclose(velocity[row], expected, atol=2e-5)


@pytest.mark.parametrize(("size", "layers", "width", "heads"), [("s", 12, 384, 6), ("xl", 28, 1152, 16)])
def test_sizes_are_those_of_rae_s_configs(size: str, layers: int, width: int, heads: int) -> None:
    """RAE gives 839 M for XL; theirs counts 256 positions of width 1152 and 256 frequencies as parameters."""
    config = DiTDHConfig.of_size(size)
    assert (config.num_layers, config.hidden_dim, config.num_heads) == (layers, width, heads)
    assert (config.head.num_layers, config.head.hidden_dim, config.head.num_heads) == (2, 2048, 16)
    assert config.latent_shape == (768, 16, 16)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DiTDH(config).parameters())
    assert count == by_formula(config)
    if size == "xl":
        assert round((count + 256 * 1152 + 256) / 1e6) == 839


def by_formula(config: DiTDHConfig) -> int:
    """Parameters counted by hand, layer by layer."""
    d, w, k = config.hidden_dim, config.head.hidden_dim, config.num_classes + 1
    c = config.latent_dim * config.patch_size**2

    def block(dim: int, heads: int) -> int:
        hidden = 8 * dim // 3
        attention = 4 * dim * dim + 4 * dim + (2 * dim // heads if config.qk_norm else 0)
        return attention + 3 * dim * hidden + 2 * hidden + dim + 2 * dim + 6 * dim * dim + 6 * dim

    ends = (c * d + d) + (c * w + w) + (512 * d + d + d * d + d) + k * d + (d * w + w)
    final = w + (2 * w * w + 2 * w) + (w * c + c)
    blocks = config.num_layers * block(d, config.num_heads)
    return ends + blocks + config.head.num_layers * block(w, config.head.num_heads) + final


@pytest.mark.parametrize("changes", [{"patch_size": 2}, {"qk_norm": True}])
def test_every_choice_counts_and_gets_gradients(changes: dict[str, int]) -> None:
    config = replace(TINY, **changes)
    model = shaken(DiTDH(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == by_formula(config)
    x = torch.randn(4, *TINY.latent_shape)
    out = model(x, torch.rand(4), torch.arange(4))
    assert out.shape == x.shape
    out.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_untrained_velocity_is_zero() -> None:
    x = torch.randn(3, *TINY.latent_shape)
    assert not DiTDH(TINY)(x, torch.rand(3), torch.tensor([0, 1, 3])).any()


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_checkpointed_blocks_change_no_bit_of_a_gradient(model: DiTDH, blocks: int) -> None:
    """3 of them: those of the DiT and one of the head."""
    x, t, labels = torch.randn(2, *TINY.latent_shape), torch.rand(2), torch.tensor([0, 3])

    def gradients(checkpointed: int) -> list[torch.Tensor]:
        model.checkpoint_blocks = checkpointed
        model.zero_grad()
        model(x, t, labels).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain, again = gradients(0), gradients(blocks)
    assert len(plain) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("shape", [(12,), (12, 4, 4)])
def test_statistics_per_channel_or_per_place(model: DiTDH, shape: tuple[int, ...]) -> None:
    mean, std = torch.randn(shape), torch.rand(shape) + 0.5
    model.set_statistics(mean, std)
    z = torch.randn(2, *TINY.latent_shape)
    x = model.normalise(z)
    place = (3, 1, 2)[: len(shape)]
    torch.testing.assert_close(x[:, 3, 1, 2], (z[:, 3, 1, 2] - mean[place]) / std[place])
    torch.testing.assert_close(model.denormalise(x), z)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_half_precision_changes_little(qk_norm: bool) -> None:
    model = shaken(DiTDH(replace(TINY, qk_norm=qk_norm))).eval()
    x, t, labels = torch.randn(3, *TINY.latent_shape), torch.rand(3), torch.arange(3)
    exact = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, labels)
    assert torch.nn.functional.cosine_similarity(low.float().flatten(1), exact.flatten(1)).min() > 0.99


def test_statistics_of_another_shape_are_refused(model: DiTDH) -> None:
    with pytest.raises(ValueError, match=r"must be \(12,\) or \(12, 4, 4\), got \(4,\) and \(4,\)"):
        model.set_statistics(torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"hidden_dim": 0}}, "head.hidden_dim must be >= 1, got 0"),
        ({"head": {"num_heads": 3}}, "got 3 heads for a width of 2048"),
        ({"patch_size": 3}, "patch_size must divide grid_size, got 3 and 4"),
    ],
)
def test_impossible_sizes_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(
            TINY,
            **{
                key: HeadConfig(**value) if isinstance(value, dict) else value
                for key, value in changes.items()
            },
        )


def test_a_config_builds_its_class(tiny_dit_config: LightningDiTConfig) -> None:
    assert isinstance(build_generator(tiny_dit_config), LightningDiT)
    built = build_generator(TINY, checkpoint_blocks=2)
    assert isinstance(built, DiTDH)
    assert built.checkpoint_blocks == 2
