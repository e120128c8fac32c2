"""Half precision: what is rounded, that it is training's autocast, and how far it is from float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH
from openpae.models.encoders import FrozenEncoder
from openpae.models.generator import LatentGenerator
from openpae.models.precision import HALF, MixedPrecision
from openpae.models.saved import load_generator, load_tokenizer
from openpae.models.tokenizer import PAE
from openpae.storage.model_folder import identity_of
from tests.conftest import shaken
from tests.models.test_ditdh import TINY


@pytest.fixture(params=["tokenizer", "dit", "ditdh"])
def model(request: pytest.FixtureRequest, tiny_pae: PAE, tiny_dit: LightningDiT) -> MixedPrecision:
    return {"tokenizer": tiny_pae, "dit": tiny_dit, "ditdh": shaken(DiTDH(TINY)).eval()}[request.param]


@torch.no_grad()
def outputs(model: MixedPrecision) -> list[Tensor]:
    """What a user takes from a model: latents, images and their decodes, or the velocity."""
    g = torch.Generator().manual_seed(1)
    if isinstance(model, LatentGenerator):
        x, t = torch.randn(4, *model.config.latent_shape, generator=g), torch.rand(4, generator=g)
        return [model(x, t, torch.tensor([0, 1, 2, 0]))]
    assert isinstance(model, PAE)
    size, shape = model.config.image_size, model.config.latent_shape
    images, z = torch.rand(2, 3, size, size, generator=g), torch.randn(2, *shape, generator=g)
    return [model.encode(images), model.decode(z), model(images)[1][0]]


@pytest.mark.parametrize("dtype", HALF)
def test_it_is_the_autocast_of_training_to_the_bit(model: MixedPrecision, dtype: torch.dtype) -> None:
    half = copy.deepcopy(model).to(dtype)
    with torch.autocast("cpu", dtype):
        expected = outputs(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(half), expected, strict=True))


@pytest.mark.parametrize("dtype", HALF)
def test_it_is_near_float32(model: MixedPrecision, dtype: torch.dtype) -> None:
    """The bound of the docstring: n independent roundings, each of at most u."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    bound = (3 * len(layers)) ** 0.5 * torch.finfo(dtype).eps / 2
    for a, b in zip(outputs(copy.deepcopy(model).to(dtype)), outputs(model), strict=True):
        assert 0 < (a.double() - b).norm() / b.double().norm() <= bound


def test_every_way_to_cast_rounds_the_same_weights(model: MixedPrecision) -> None:
    for cast, dtype in (
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda m: m.to(dtype=torch.float16), torch.float16),
    ):
        half = cast(copy.deepcopy(model))
        assert half.half_dtype == dtype
        layers = {
            f"{name}.{part}"
            for name, layer in half.named_modules()
            if isinstance(layer, nn.Linear)
            for part, _ in layer.named_parameters()
        }
        rounded = {name for name, weight in half.named_parameters() if weight.dtype == dtype}
        assert rounded == layers
        before = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, value in (dict(half.named_parameters()) | dict(half.named_buffers())).items():
            expected = before[name].to(dtype) if name in layers else before[name]
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected)


def test_float_gives_float32_back(model: MixedPrecision) -> None:
    again = copy.deepcopy(model).bfloat16().float()
    assert again.half_dtype is None
    assert {weight.dtype for weight in again.parameters()} == {torch.float32}
    moved = copy.deepcopy(model).bfloat16().to("cpu")
    assert moved.half_dtype == torch.bfloat16


def test_gradients_move_with_their_weights(model: MixedPrecision) -> None:
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    model.bfloat16()
    assert all(weight.grad.dtype == weight.dtype for weight in model.parameters() if weight.grad is not None)


def test_latents_and_images_are_float32(tiny_pae: PAE) -> None:
    tiny_pae.bfloat16()
    z = tiny_pae.encode(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16))
    assert z.dtype == tiny_pae.decode(z).dtype == torch.float32
    torch.testing.assert_close(z.square().mean(dim=1), torch.ones(1, 4, 4), rtol=0, atol=1e-5)


def test_every_family_of_encoders_can_be_rounded(encoder: FrozenEncoder) -> None:
    patch = 8
    decoder = DecoderConfig(hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=64, patch_size=patch)
    config = PAEConfig(
        encoder="tiny", image_size=4 * patch, latent_dim=8, modulator_layers=1, decoder=decoder
    )
    model = PAE(config, encoder).eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model.bfloat16()), expected, strict=True))


def test_folders_load_in_half_precision(
    tokenizer_folder: Path, tiny_dit: LightningDiT, tmp_path: Path
) -> None:
    loaded = load_tokenizer(tokenizer_folder, torch_dtype=torch.bfloat16)
    expected = load_tokenizer(tokenizer_folder).to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded), outputs(expected), strict=True))
    tiny_dit.made_with = "0" * 16
    tiny_dit.save_pretrained(tmp_path / "dit")
    assert load_generator(tmp_path / "dit", torch_dtype=torch.float16).half_dtype == torch.float16
    assert load_generator(tmp_path / "dit", torch_dtype=torch.float32).half_dtype is None
    with pytest.raises(ValueError, match=r"torch_dtype must be torch.float32, .* got torch.float64"):
        load_generator(tmp_path / "dit", torch_dtype=torch.float64)


def test_a_model_in_half_precision_is_saved_in_the_precision_asked_for(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    half = load_tokenizer(tokenizer_folder, torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "full")
    load_tokenizer(tokenizer_folder).to(torch.bfloat16).float().save_pretrained(tmp_path / "again")
    assert identity_of(tmp_path / "full") == identity_of(tmp_path / "again")


def test_a_rounded_encoder_has_no_fingerprint(tiny_pae: PAE, tmp_path: Path) -> None:
    tiny_pae.bfloat16()
    with pytest.raises(ValueError, match=r"rounded to torch.bfloat16, so its fingerprint is not known"):
        tiny_pae.save_pretrained(tmp_path / "saved")
