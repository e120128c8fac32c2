"""Released weights are imported name by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from openpae.dit import LightningDiTConfig
from openpae.encoders import load_encoder
from openpae.official import import_generator, import_tokenizer
from openpae.sampling import SamplerConfig, sample_latents
from openpae.tokenizer import PAE

GOLDEN = Path(__file__).parent / "golden" / "lightningdit_tiny.safetensors"


@pytest.fixture(scope="module")
def released() -> tuple[dict[str, Tensor], LightningDiTConfig, dict[str, Tensor]]:
    """The golden generator under the authors' names, its config, and what it must give."""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sizes = json.loads(file.metadata()["config"])
    config = LightningDiTConfig(
        latent_dim=sizes["in_channels"],
        grid_size=sizes["input_size"],
        hidden_dim=sizes["hidden_size"],
        num_layers=sizes["depth"],
        num_heads=sizes["num_heads"],
        num_classes=sizes["num_classes"],
        qk_norm=sizes["use_qknorm"],
    )
    theirs = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    return theirs, config, tensors


def under_their_names(model: PAE) -> dict[str, Tensor]:
    """A tokenizer as the authors' release holds it, inverse to the importer and written without it."""
    from openpae.layers import sincos_2d

    theirs: dict[str, Tensor] = {}
    places = [
        ("modulator.patch_embed.", "delta_encoder.patch_embed.proj."),
        ("modulator.fusion.proj.", "delta_encoder.fusion_proj."),
        ("modulator.fusion.norm.", "delta_encoder.final_ln."),
        ("modulator.layers.", "delta_encoder.layers."),
        ("projector.attn.", "latent_compressor.0."),
        ("projector.to_latent.", "latent_compressor.1."),
        ("deprojector.from_latent.", "latent_decompressor.0."),
        ("deprojector.attn.", "latent_decompressor.1."),
        ("decoder.embed.", "decoder.decoder_embed."),
        ("decoder.cls_token", "decoder.trainable_cls_token"),
        ("decoder.norm.", "decoder.decoder_norm."),
        ("decoder.to_pixels.", "decoder.decoder_pred."),
        ("decoder.blocks.", "decoder.decoder_layers."),
        ("encoder.backbone.", "encoder.encoder."),
    ]
    parts = [
        (".norm_self.", ".norm1."),
        (".norm_query.", ".norm2_q."),
        (".norm_context.", ".norm2_kv."),
        (".norm_mlp.", ".norm3."),
    ]
    block = [
        (".attn.proj.", ".attention.output.dense."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ]
    for name, value in model.state_dict().items():
        ours, new = next(pair for pair in places if name.startswith(pair[0]))
        rest = name.removeprefix(ours)
        if ours == "decoder.blocks." and ".attn.qkv." in rest:
            number, kind = rest.split(".")[0], rest.rsplit(".", 1)[1]
            for letter, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[f"{new}{number}.attention.attention.{letter}.{kind}"] = part
            continue
        for old, their in {"modulator.layers.": parts, "decoder.blocks.": block}.get(ours, []):
            rest = rest.replace(old, their)
        theirs[new + rest] = value
    (side, _), config = model.config.grid_shape, model.config
    theirs["delta_encoder.pos_embed"] = sincos_2d(side, side, model.spec.dim)[None]
    width = config.decoder.hidden_dim
    theirs["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, width), sincos_2d(side, side, width)])[
        None
    ]
    return theirs


@torch.no_grad()
def test_the_golden_generator_agrees(released: Any) -> None:
    """Velocity, and the results of 19 Euler steps without and with guidance (their null class is ours)."""
    theirs, config, golden = released
    model = import_generator({"ema": theirs, "model": {}}, config)
    velocity = model(golden["io.x"], golden["io.t"], golden["io.labels"])
    torch.testing.assert_close(velocity, golden["io.velocity"], rtol=0, atol=1e-5)
    for name, guidance in (("conditional", 1.0), ("guided", 2.5)):
        sampler = SamplerConfig(steps=19, shift=0.4, guidance=guidance, guidance_start=0.25)
        drawn = sample_latents(model, golden["sample.labels"], golden["sample.noise"], sampler)
        torch.testing.assert_close(drawn, golden[f"sample.{name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("holder", ["ema", "model", None])
def test_wrappers_around_names_do_not_matter(released: Any, wrap: str, holder: str | None) -> None:
    theirs, config, golden = released
    wrapped = {wrap + name: value for name, value in theirs.items()}
    model = import_generator({holder: wrapped, "step": 3} if holder else wrapped, config)
    velocity = model(golden["io.x"], golden["io.t"], golden["io.labels"])
    torch.testing.assert_close(velocity, golden["io.velocity"], rtol=0, atol=1e-5)


def test_averaged_weights_are_preferred(released: Any) -> None:
    theirs, config, _ = released
    model = import_generator({"model": {}, "ema": theirs}, config)
    assert torch.equal(model.patch_embed.weight, theirs["x_embedder.proj.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("x_embedder.proj.weight"), r"1 keys missing \(patch_embed.weight\)"),
        (lambda s: s.update({"x_embedder.extra": torch.zeros(1)}), "1 unknown names: x_embedder.extra"),
        (
            lambda s: s.update({"blocks.9.attn.proj.bias": torch.zeros(1)}),
            r"1 unexpected \(blocks.9.attn.proj.bias\)",
        ),
        (
            lambda s: s.update({"final_layer.linear.bias": torch.zeros(3)}),
            r"1 of another shape \(to_velocity.bias \(3,\)",
        ),
        (lambda s: s.pop("pos_embed"), "released weights lack pos_embed"),
        (
            lambda s: s.update({"pos_embed": s["pos_embed"] + 1}),
            "pos_embed of the released weights is not the fixed",
        ),
        (
            lambda s: s.update({"feat_rope.freqs_cos": torch.zeros(2, 2)}),
            r"freqs_cos.*shape \(2, 2\).*check image_size",
        ),
        (lambda s: s.update({"step": 3}), "must map names to tensors; not so: step"),
    ],
)
def test_generator_weights_that_do_not_fit_are_refused(
    released: Any, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    theirs, config, _ = released
    state = dict(theirs)
    change(state)
    with pytest.raises(ValueError, match=message):
        import_generator(state, config)


def test_released_tokenizer_weights_arrive_at_their_places(tiny_pae: PAE) -> None:
    """Random weights of ours, brought under the authors' names and back, give the same tokenizer."""
    released = {"model": {f"module.{name}": value for name, value in under_their_names(tiny_pae).items()}}
    encoder = load_encoder("random-tiny")
    with torch.no_grad():
        encoder.backbone.cls_token.zero_()  # type: ignore[operator, union-attr]  # the file's weights win
    model = import_tokenizer(released, tiny_pae.config, encoder)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in tiny_pae.state_dict().items())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.reconstruct(images), tiny_pae.reconstruct(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("latent_compressor.1.bias"), r"1 keys missing \(projector.to_latent.bias\)"),
        (
            lambda s: s.pop("decoder.decoder_layers.0.attention.attention.key.bias"),
            r"1 keys missing \(decoder.blocks.0.attn.qkv.bias\), 2 unexpected",
        ),
        (lambda s: s.update({"loss.logvar": torch.zeros(1)}), "1 unknown names: loss.logvar"),
        (
            lambda s: s.update({"latent_compressor.1.bias": torch.zeros(9)}),
            r"to_latent.bias \(9,\) for \(8,\)",
        ),
        (lambda s: s.pop("decoder.decoder_pos_embed"), "released weights lack decoder.decoder_pos_embed"),
        (
            lambda s: s["delta_encoder.pos_embed"].mul_(2),
            "delta_encoder.pos_embed of the released weights is not",
        ),
    ],
)
def test_tokenizer_weights_that_do_not_fit_are_refused(
    tiny_pae: PAE, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    state = under_their_names(tiny_pae)
    change(state)
    with pytest.raises(ValueError, match=message):
        import_tokenizer(state, tiny_pae.config, load_encoder("random-tiny"))
