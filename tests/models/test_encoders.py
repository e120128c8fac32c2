"""Frozen encoders: frozen, deterministic, and read from one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from openpae.models.backbones import EfficientNetTokens, drop_norm_affine
from openpae.models.encoders import FrozenEncoder, load_encoder
from openpae.models.vfms import ENCODERS, EncoderSpec, encoder_spec

SPEC = EncoderSpec(stride=8, dim=6, num_heads=2, num_prefix_tokens=2)


class Dropping(nn.Module):
    """A backbone that would be random in training mode, with two prefix tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 8, stride=8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.dropout(self.embed(pixels).flatten(2).mT)
        return torch.cat([torch.full_like(tokens[:, :2], 7.0), tokens], dim=1)


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with registers, saved as the hub keeps it; its last norm is not neutral."""
    torch.manual_seed(0)
    model = transformers.Dinov2WithRegistersModel(tiny_dinov2())
    nn.init.normal_(model.layernorm.weight)
    nn.init.normal_(model.layernorm.bias)
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    return folder


def tiny_dinov2() -> transformers.Dinov2WithRegistersConfig:
    return transformers.Dinov2WithRegistersConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        num_register_tokens=4,
    )


@pytest.fixture
def small_dinov2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table for it."""
    monkeypatch.setitem(ENCODERS, "small", replace(ENCODERS["dinov2-s"], dim=24, num_heads=2))


def test_training_mode_does_not_wake_dropout() -> None:
    encoder = FrozenEncoder(SPEC, Dropping())
    holder = nn.ModuleList([encoder]).train()
    assert holder.training
    assert not any(module.training for module in encoder.modules())
    pixels = torch.randn(2, 3, 16, 24)
    assert torch.equal(encoder(pixels), encoder(pixels))


def test_prefix_tokens_are_dropped() -> None:
    features = FrozenEncoder(SPEC, Dropping())(torch.randn(2, 3, 16, 24))
    assert features.shape == (2, 6, 6)
    assert not (features == 7).any()


def test_frozen_means_no_gradient_and_trainable_means_one() -> None:
    pixels = torch.randn(1, 3, 16, 8, requires_grad=True)
    frozen, trained = (FrozenEncoder(SPEC, Dropping(), trainable=value) for value in (False, True))
    assert not frozen(pixels).requires_grad
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trained(pixels).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())
    with torch.no_grad():
        assert not trained(pixels).requires_grad
    assert not any(
        module.training for module in trained.train().modules()
    )  # finetuned, still without dropout


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_random_encoder_is_the_same_every_time_and_takes_any_grid(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    first, before = load_encoder("random-tiny"), torch.random.get_rng_state()
    torch.manual_seed(2)
    second = load_encoder("random-tiny")
    pixels = torch.randn(2, 3, *size)
    features = first(pixels)
    assert torch.equal(features, second(pixels))
    assert features.shape == (2, size[0] * size[1] // 64, first.spec.dim)
    torch.manual_seed(1)
    assert torch.equal(
        torch.random.get_rng_state(), before
    )  # building it draws nothing from the user's numbers


def test_features_have_zero_mean_and_unit_variance_per_token(small_dinov2: None, dinov2_folder: Path) -> None:
    for encoder in (load_encoder("random-tiny"), load_encoder("small", str(dinov2_folder))):
        stride = encoder.spec.stride
        features = encoder(torch.randn(2, 3, 4 * stride, 4 * stride))
        torch.testing.assert_close(features.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
        torch.testing.assert_close(features.var(-1, correction=0), torch.ones(2, 16), atol=1e-3, rtol=0)


def test_weights_of_a_folder_give_the_packages_own_features(small_dinov2: None, dinov2_folder: Path) -> None:
    """The last norm's scale and shift apart, it is the model of transformers without its prefix tokens."""
    model = transformers.Dinov2WithRegistersModel.from_pretrained(dinov2_folder).eval()
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state[:, 5:]
        expected = (tokens - model.layernorm.bias) / model.layernorm.weight
    encoder = load_encoder("small", str(dinov2_folder))
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_dropping_the_scale_of_a_norm_keeps_its_epsilon() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=0.5))
    drop_norm_affine(model, "1")
    assert isinstance(model[1], nn.LayerNorm)
    assert model[1].eps == 0.5
    assert not list(model[1].parameters())
    nested = nn.ModuleDict({"inner": model})
    drop_norm_affine(nested, "inner.1")
    assert not list(nested["inner"][1].parameters())


def test_a_missing_norm_is_answered_with_those_that_are_there() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    for name in ("layernorm", "0", "deep.norm"):
        with pytest.raises(ValueError, match=rf"Sequential has no LayerNorm '{name}'; it has: 1"):
            drop_norm_affine(model, name)


def test_every_row_of_the_table_can_be_built_on() -> None:
    """Widths that heads divide and that 2-D positions can code."""
    for name, spec in ENCODERS.items():
        assert spec.dim % spec.num_heads == 0, name
        assert spec.dim % 4 == 0, name
        assert encoder_spec(name) is spec
        assert (spec.family == "transformers") == bool(spec.model_class and spec.repo), name


def test_unknown_encoders_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown encoder 'dino'; known: dinov2-s, .*random-tiny"):
        load_encoder("dino")


def test_a_source_for_an_encoder_that_takes_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'random-tiny' takes its weights from a package.*encoder_source"):
        load_encoder("random-tiny", "some/folder")


def test_unavailable_weights_are_named(small_dinov2: None, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no weights of Dinov2With.* at .*empty.*encoder_source"):
        load_encoder("small", str(tmp_path / "empty"))


def test_weights_of_another_model_are_refused(small_dinov2: None, tmp_path: Path) -> None:
    """transformers would fill missing weights with random numbers and warn."""
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    tiny_dinov2().save_pretrained(tmp_path)  # its config names another class
    with pytest.raises(ValueError, match=r"do not fit Dinov2WithRegistersModel: .*embeddings"):
        load_encoder("small", str(tmp_path))


def test_weights_of_another_size_are_refused(dinov2_folder: Path) -> None:
    """The folder's own config decides the size, so that nothing else would notice."""
    with pytest.raises(ValueError, match="are of width 24, but the encoder's row says 384"):
        load_encoder("dinov2-s", str(dinov2_folder))


def test_that_mlp_has_no_other_home() -> None:
    with pytest.raises(ValueError, match=r"MLP whose weights only a released tokenizer holds; import one"):
        load_encoder("internvit-300m-mlp", "anywhere")


def test_a_sum_of_layers_of_efficientnet_adds_blocks_of_one_shape() -> None:
    torch.manual_seed(0)
    tokens = EfficientNetTokens(pretrained=False).eval()
    summed = EfficientNetTokens(pretrained=False, layers=3).eval()
    summed.load_state_dict(tokens.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x, taps = tokens.stem(pixels), []
        for block in tokens.fine:
            x = block(x)
            taps.append(x)
        out, plain = summed(pixels), tokens(pixels)
    total = (taps[8] + taps[9] + taps[10]).flatten(2).mT
    torch.testing.assert_close(out[..., :112], nn.functional.layer_norm(total, (112,)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[..., 112:], plain[..., 112:])
    with pytest.raises(
        ValueError, match="efficientnet-lite0 has 3 layers of one shape, so no sum of its last 4"
    ):
        EfficientNetTokens(pretrained=False, layers=4)


def test_the_number_of_layers_belongs_to_the_name() -> None:
    assert encoder_spec("dinov2-l+1") == encoder_spec("dinov2-l") == ENCODERS["dinov2-l"]
    assert encoder_spec("dinov2-l+4") == replace(ENCODERS["dinov2-l"], layers=4)
    for name in ("dinov2-l+", "dinov2-l+0", "dinov2-l+-1", "dinov2-l+x"):
        with pytest.raises(
            ValueError, match=r"must be NAME\+K with K >= 1, the number of last layers to sum"
        ):
            encoder_spec(name)
    with pytest.raises(ValueError, match="RandomViT has 1 layers, so no sum of its last 2"):
        load_encoder("random-tiny+2")
