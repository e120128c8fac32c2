"""The tokenizer: equal to an independent one; untrained it shows the VFM; images of any size go through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from openpae.interop.released import import_tokenizer
from openpae.models.backbones import drop_norm_affine
from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.decoder import Deprojector, PixelDecoder, Projector
from openpae.models.encoders import FrozenEncoder, load_encoder
from openpae.models.layers import sincos_2d
from openpae.models.modulator import DetailFusion, DetailModulator, NoModulator
from openpae.models.tokenizer import PAE, build_tokenizer
from openpae.models.vfms import ENCODERS, EncoderSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "pae_dinov2_tiny.safetensors"


def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def golden_model(tensors: dict[str, Tensor], sizes: dict[str, Any]) -> PAE:
    """The golden file's tokenizer, through the importer of released weights."""
    backbone = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes["vfm"]))
    drop_norm_affine(backbone, "layernorm")
    encoder = FrozenEncoder(replace(ENCODERS["dinov2-l"], dim=48, num_heads=3), backbone)
    decoder = sizes["decoder"]
    config = PAEConfig(
        image_size=64,
        latent_dim=8,
        modulator_layers=2,
        decoder=DecoderConfig(
            hidden_dim=decoder["width"],
            num_layers=decoder["layers"],
            num_heads=decoder["heads"],
            mlp_dim=decoder["mlp"],
            patch_size=decoder["patch"],
        ),
    )
    released = {
        key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")
    }
    return import_tokenizer(released, config, encoder)


@torch.no_grad()
def test_every_stage_agrees_with_the_golden_file() -> None:
    tensors, sizes = golden()
    model = golden_model(tensors, sizes)
    images = tensors["io.images"]
    features = model.features(images)
    modulated = model.modulator(model.preprocess(images), features)
    latents = model.encode(images)
    stages = {
        "features": features,
        "modulated": modulated,
        "latents": latents,
        "reconstruction": model.decode(latents),
    }
    for name, value in stages.items():
        torch.testing.assert_close(value, tensors[f"io.{name}"], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["modulate", "add"])
def test_untrained_fusion_returns_the_frozen_features(kind: Literal["modulate", "add"]) -> None:
    modulator = DetailModulator(16, 2, 2, 8, (4, 4), kind)
    pixels, features = torch.randn(2, 3, 32, 32), torch.randn(2, 16, 16)
    torch.testing.assert_close(modulator(pixels, features), nn.functional.layer_norm(features, (16,)))


def test_untrained_concatenation_sees_the_pixels() -> None:
    modulator = DetailModulator(16, 2, 2, 8, (4, 4), "concat")
    features = torch.randn(1, 16, 16)
    a, b = (modulator(torch.randn(1, 3, 32, 32), features) for _ in range(2))
    assert not torch.allclose(a, b, atol=1e-3)


def test_fusions_are_the_formulas_of_their_docstring() -> None:
    u, d = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    modulate, add, concat = (DetailFusion(8, kind) for kind in ("modulate", "add", "concat"))  # type: ignore[arg-type]
    gamma, beta = (d @ modulate.proj.weight.T + modulate.proj.bias).chunk(2, dim=-1)
    torch.testing.assert_close(modulate(u, d), modulate.norm(u * (1 + gamma) + beta))
    torch.testing.assert_close(add(u, d), add.norm(u + add.proj(d)))
    torch.testing.assert_close(concat(u, d), concat.norm(concat.proj(torch.cat([u, d], -1))))


@torch.no_grad()
def test_without_fusion_the_latent_is_the_features(tiny_config: PAEConfig) -> None:
    """RAE: the features, which the VFM's last norm has put on the sphere, and a decoder of them."""
    model = build_tokenizer(replace(tiny_config, fusion="none", latent_dim=48))
    images = torch.rand(2, 3, 32, 40)
    features = model.features(images)
    z = model.encode(images)
    assert z.shape == (2, 48, 4, 5)
    torch.testing.assert_close(z.flatten(2).mT, features, atol=1e-4, rtol=1e-4)
    expected = model.decoder(features, 4, 5) * model.encoder_input.std + model.encoder_input.mean
    torch.testing.assert_close(model.decode(z), expected, atol=1e-3, rtol=1e-3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 8}, "latent_dim must be 48, got 8"),
        ({"latent_dim": 48, "width": 32}, "width must be null, got 32"),
    ],
)
def test_without_fusion_no_width_is_chosen(
    tiny_config: PAEConfig, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_tokenizer(replace(tiny_config, fusion="none", **changes))


def test_latents_lie_on_the_sphere_and_are_deterministic(tiny_pae: PAE) -> None:
    images = torch.rand(2, 3, 32, 32)
    z = tiny_pae.train().encode(images)
    assert z.shape == (2, *tiny_pae.config.latent_shape)
    torch.testing.assert_close(z.square().mean(1), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    assert torch.equal(z, tiny_pae.encode(images))


def test_the_whole_sample_can_share_one_sphere(tiny_config: PAEConfig) -> None:
    model = build_tokenizer(replace(tiny_config, sphere="sample"))
    z = model.encode(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(z.square().mean((1, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
    assert z.square().mean(1).std() > 1e-3


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (64, 40), (8, 8)])
def test_any_multiple_of_the_patch_goes_through(tiny_pae: PAE, size: tuple[int, int]) -> None:
    """Other resolutions and shapes than the training one; the latent grid follows."""
    images = torch.rand(2, 3, *size)
    z = tiny_pae.encode(images)
    assert z.shape == (2, 8, size[0] // 8, size[1] // 8)
    restored = tiny_pae.reconstruct(images)
    assert restored.shape == images.shape
    assert restored.min() >= 0
    assert restored.max() <= 1


def test_rows_and_columns_are_not_mixed_up(tiny_pae: PAE) -> None:
    """On a wide image, a change of the top right corner moves the top right of the features most."""
    images = torch.rand(1, 3, 16, 48)
    changed = images.clone()
    changed[..., :8, 40:] = 1 - changed[..., :8, 40:]
    features, other = tiny_pae.features(images), tiny_pae.features(changed)
    moved = (features - other).norm(dim=-1).view(2, 6)
    assert moved.argmax() == 5
    pixels, tokens = tiny_pae.preprocess(images), torch.randn(1, 12, 48)
    shift = tiny_pae.modulator(tiny_pae.preprocess(changed), tokens) - tiny_pae.modulator(pixels, tokens)
    assert shift.norm(dim=-1).view(2, 6).argmax() == 5


def test_images_are_resized_to_the_encoders_grid_and_normalised() -> None:
    """Patches of 8 pixels, tokens of 14: 32 pixels become 56, (0.485, ...) becomes 0."""
    spec = EncoderSpec(stride=14, dim=16, num_heads=2)
    decoder = DecoderConfig(hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=16, patch_size=8)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 14, 14), nn.Flatten(2))
    model = PAE(PAEConfig(image_size=32, decoder=decoder), FrozenEncoder(spec, backbone))
    mean = torch.tensor(spec.image_mean).view(1, 3, 1, 1)
    pixels = model.preprocess(mean.expand(2, 3, 32, 64))
    assert pixels.shape == (2, 3, 56, 112)
    assert pixels.abs().max() < 1e-5
    images = torch.rand(1, 3, 32, 32)
    expected = nn.functional.interpolate(images, size=(56, 56), mode="bicubic", align_corners=False)
    std = torch.tensor(spec.image_std).view(1, 3, 1, 1)
    torch.testing.assert_close(model.preprocess(images), (expected - mean) / std)


def test_given_features_take_the_place_of_the_encoder(tiny_pae: PAE, tiny_config: PAEConfig) -> None:
    """Cached ones come in float16; without its encoder the rest of the tokenizer gives the same latents."""
    images = torch.rand(2, 3, 32, 32)
    features = tiny_pae.features(images)
    torch.testing.assert_close(tiny_pae.encode(images, features), tiny_pae.encode(images))
    torch.testing.assert_close(
        tiny_pae.encode(images, features.half()), tiny_pae.encode(images), atol=2e-2, rtol=0
    )
    bare = PAE(tiny_config)
    state = {key: value for key, value in tiny_pae.state_dict().items() if not key.startswith("encoder.")}
    bare.load_state_dict(state)
    torch.testing.assert_close(bare.encode(images, features), tiny_pae.encode(images))


def test_cached_latents_can_be_decoded_as_they_are(tiny_pae: PAE) -> None:
    z = tiny_pae.encode(torch.rand(1, 3, 32, 32)).bfloat16()
    torch.testing.assert_close(tiny_pae.decode(z), tiny_pae.decode(z.float()))


def test_half_precision_changes_little(tiny_pae: PAE) -> None:
    images = torch.rand(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        z = tiny_pae.encode(images)
        restored = tiny_pae.decode(z)
    assert z.dtype == restored.dtype == torch.float32
    torch.testing.assert_close(z.square().mean(1), torch.ones(4, 4, 4), atol=1e-3, rtol=0)
    assert nn.functional.cosine_similarity(z, tiny_pae.encode(images), dim=1).min() > 0.98


@pytest.mark.parametrize("fusion", ["modulate", "add", "concat", "finetune"])
def test_gradients_reach_all_that_is_trained_and_nothing_else(tiny_config: PAEConfig, fusion: Any) -> None:
    model = build_tokenizer(replace(tiny_config, fusion=fusion)).train()
    with torch.no_grad():  # zeros would stop the gradient on the first step
        for parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(2, 3, 32, 32)
    nn.functional.l1_loss(model.decode(model.encode(images)), images).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        trained = fusion == "finetune" or not name.startswith("encoder.")
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
    assert isinstance(model.modulator, NoModulator) == (fusion == "finetune")


def test_a_width_of_its_own_narrows_the_features(tiny_config: PAEConfig) -> None:
    model = build_tokenizer(replace(tiny_config, width=16))
    assert model.deprojector.from_latent.out_channels == 16
    assert model.encode(torch.rand(1, 3, 32, 32)).shape == (1, 8, 4, 4)
    assert model.narrow.weight.shape == (16, 48)


def test_projector_has_neither_residual_nor_norm_and_deprojector_mirrors_it() -> None:
    """With all values of the attention at zero, its bias is all that comes through."""
    projector, deprojector = Projector(16, 2, 8), Deprojector(16, 2, 8)
    assert projector.to_latent.weight.shape == (8, 16, 3, 3)
    assert deprojector.from_latent.weight.shape == (16, 8, 3, 3)
    for attention in (projector.attn, deprojector.attn):
        assert attention.qkv.bias is None
        nn.init.zeros_(attention.qkv.weight)
        nn.init.ones_(attention.proj.bias)
    tokens = torch.randn(2, 9, 16)
    torch.testing.assert_close(projector(tokens, 3, 3), projector.to_latent(torch.ones(2, 16, 3, 3)))
    torch.testing.assert_close(deprojector(torch.randn(2, 8, 3, 3)), torch.ones(2, 9, 16))


def test_the_cls_token_of_the_decoder_has_no_position_and_is_dropped() -> None:
    config = DecoderConfig(hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=16, patch_size=4)
    decoder = PixelDecoder(8, config, (3, 3))
    assert not decoder.cls_token.any()
    assert torch.equal(decoder.positions[0], sincos_2d(3, 3, 16))  # type: ignore[index]
    before = decoder(torch.randn(2, 9, 8), 3, 3)
    assert before.shape == (2, 3, 12, 12)
    decoder.blocks = nn.ModuleList()  # nothing mixes tokens now, so the CLS token can show up nowhere
    tokens = torch.randn(1, 9, 8)
    plain = decoder(tokens, 3, 3)
    nn.init.ones_(decoder.cls_token)
    assert torch.equal(decoder(tokens, 3, 3), plain)


def test_colours_are_restored_by_the_encoders_mean_and_std(tiny_pae: PAE) -> None:
    nn.init.zeros_(tiny_pae.decoder.to_pixels.weight)
    nn.init.zeros_(tiny_pae.decoder.to_pixels.bias)
    decoded = tiny_pae.decode(torch.randn(1, 8, 4, 4))
    torch.testing.assert_close(decoded, tiny_pae.encoder_input.mean.expand_as(decoded))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 30), r"multiples of 8, got \(1, 3, 32, 30\)"),
        (torch.zeros(1, 1, 32, 32), r"must be \(B, 3, H, W\).*got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 32, 32, 3), r"must be \(B, 3, H, W\).*got \(1, 32, 32, 3\)"),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            r"float in \[0, 1\], got torch.uint8; divide uint8 by 255",
        ),
    ],
)
def test_unsuitable_images_are_refused(tiny_pae: PAE, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pae.encode(images)


def test_encoding_without_an_encoder_says_how_to_get_one(tiny_config: PAEConfig) -> None:
    with pytest.raises(RuntimeError, match=r"without its encoder 'random-tiny'.*build_tokenizer\(config\)"):
        PAE(tiny_config).encode(torch.rand(1, 3, 32, 32))


def test_any_module_with_a_spec_can_be_the_encoder(tiny_config: PAEConfig) -> None:
    spec = EncoderSpec(stride=4, dim=12, num_heads=3, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spec = spec
            self.embed = nn.Conv2d(3, 12, 4, stride=4)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.embed(pixels).flatten(2).mT

    model = PAE(replace(tiny_config, encoder="mine"), Mine())
    assert model.encode(torch.rand(1, 3, 32, 32)).shape == (1, 8, 4, 4)
    with pytest.raises(ValueError, match="unknown encoder 'mine'"):
        PAE(replace(tiny_config, encoder="mine"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 36}, "image_size must be a multiple of decoder.patch_size, got 36 and 8"),
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
        ({"latent_dim": 0}, "latent_dim must be >= 1, got 0"),
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"modulator_layers": -1}, "modulator_layers must be >= 0, got -1"),
    ],
)
def test_impossible_sizes_are_named(tiny_config: PAEConfig, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiny_config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 0}, "decoder.patch_size must be >= 1, got 0"),
        ({"num_layers": 0}, "decoder.num_layers must be >= 1, got 0"),
        ({"num_heads": 3}, "got 3 heads for a width of 32"),
    ],
)
def test_impossible_decoder_sizes_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**({"hidden_dim": 32, "num_heads": 2} | changes))


def test_the_encoder_of_a_config_is_loaded_with_it(tiny_config: PAEConfig) -> None:
    model = build_tokenizer(tiny_config)
    images = torch.rand(1, 3, 32, 32)
    expected = load_encoder("random-tiny")(model.preprocess(images))
    assert torch.equal(model.features(images), expected)
