"""Import of the authors' released weights, by a written map of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from openpae.dit import LightningDiT, LightningDiTConfig
from openpae.encoders import Encoder
from openpae.layers import rope_2d, sincos_2d
from openpae.tokenizer import PAE, PAEConfig
from openpae.weights import load_strict

# Names of the authors' release -> ours. First match wins; a name that none matches is an error.
_TOKENIZER_NAMES = [
    (r"delta_encoder\.patch_embed\.proj\.", "modulator.patch_embed."),
    (r"delta_encoder\.layers\.(\d+)\.norm1\.", r"modulator.layers.\1.norm_self."),
    (r"delta_encoder\.layers\.(\d+)\.norm2_q\.", r"modulator.layers.\1.norm_query."),
    (r"delta_encoder\.layers\.(\d+)\.norm2_kv\.", r"modulator.layers.\1.norm_context."),
    (r"delta_encoder\.layers\.(\d+)\.norm3\.", r"modulator.layers.\1.norm_mlp."),
    (r"delta_encoder\.layers\.(\d+)\.(self_attn|cross_attn|mlp)\.", r"modulator.layers.\1.\2."),
    (r"delta_encoder\.fusion_proj\.", "modulator.fusion.proj."),
    (r"delta_encoder\.final_ln\.", "modulator.fusion.norm."),
    (r"latent_compressor\.0\.", "projector.attn."),
    (r"latent_compressor\.1\.", "projector.to_latent."),
    (r"latent_decompressor\.0\.", "deprojector.from_latent."),
    (r"latent_decompressor\.1\.", "deprojector.attn."),
    (r"decoder\.decoder_embed\.", "decoder.embed."),
    (r"decoder\.trainable_cls_token$", "decoder.cls_token"),
    (r"decoder\.decoder_layers\.(\d+)\.attention\.output\.dense\.", r"decoder.blocks.\1.attn.proj."),
    (
        r"decoder\.decoder_layers\.(\d+)\.attention\.attention\.(query|key|value)\.",
        r"decoder.blocks.\1.attn.\2.",
    ),
    (r"decoder\.decoder_layers\.(\d+)\.layernorm_before\.", r"decoder.blocks.\1.norm1."),
    (r"decoder\.decoder_layers\.(\d+)\.layernorm_after\.", r"decoder.blocks.\1.norm2."),
    (r"decoder\.decoder_layers\.(\d+)\.intermediate\.dense\.", r"decoder.blocks.\1.mlp.fc1."),
    (r"decoder\.decoder_layers\.(\d+)\.output\.dense\.", r"decoder.blocks.\1.mlp.fc2."),
    (r"decoder\.decoder_norm\.", "decoder.norm."),
    (r"decoder\.decoder_pred\.", "decoder.to_pixels."),
    (r"encoder\.encoder\.", "encoder.backbone."),
]
_GENERATOR_NAMES = [
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.mlp\.", "time_mlp."),
    (r"y_embedder\.embedding_table\.", "class_embed."),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.modulation."),
    (r"blocks\.(\d+)\.(norm1|norm2|attn|mlp)\.", r"blocks.\1.\2."),
    (r"final_layer\.adaLN_modulation\.1\.", "final_modulation."),
    (r"final_layer\.norm_final\.", "final_norm."),
    (r"final_layer\.linear\.", "to_velocity."),
]


def import_tokenizer(released: Mapping[str, Any], config: PAEConfig, encoder: Encoder) -> PAE:
    """The authors' tokenizer weights as a `PAE`.

    Args:
        released: their file's content: the state dict, bare or under the key "model", names bare or behind
            "module." and "_orig_mod.".
        config: sizes of the released model.
        encoder: the VFM whose architecture the file holds; its weights are replaced by the file's.

    Raises:
        ValueError: a key is missing, left over or of another shape, or its fixed positions are not ours.
    """
    state = _plain_names(released, ("model",))
    grid, width = config.grid_shape, config.decoder.hidden_dim
    model = PAE(config, encoder)
    dim = config.width or model.spec.dim
    _take_constant(state, "delta_encoder.pos_embed", sincos_2d(*grid, dim)[None])
    with_cls = torch.cat([torch.zeros(1, width), sincos_2d(*grid, width)])[None]
    _take_constant(state, "decoder.decoder_pos_embed", with_cls)
    renamed = _rename(state, _TOKENIZER_NAMES)
    for index in range(config.decoder.num_layers):
        for kind in ("weight", "bias"):
            parts = [f"decoder.blocks.{index}.attn.{name}.{kind}" for name in ("query", "key", "value")]
            if all(part in renamed for part in parts):
                renamed[f"decoder.blocks.{index}.attn.qkv.{kind}"] = torch.cat(
                    [renamed.pop(p) for p in parts]
                )
    load_strict(model, renamed, "released tokenizer weights")
    return model.eval()


def import_generator(released: Mapping[str, Any], config: LightningDiTConfig) -> LightningDiT:
    """The authors' LightningDiT weights as ours; the latent statistics stay at 0 and 1 until they are set.

    Args:
        released: their file's content: the state dict, bare or under the key "ema" (preferred) or "model".
        config: sizes of the released model.

    Raises:
        ValueError: a key is missing, left over or of another shape, or its fixed positions are not ours.
    """
    state = _plain_names(released, ("ema", "model"))
    grid = config.token_grid
    _take_constant(state, "pos_embed", sincos_2d(*grid, config.hidden_dim)[None])
    for name, values in zip(
        ("cos", "sin"), rope_2d(*grid, config.hidden_dim // config.num_heads), strict=True
    ):
        _take_constant(state, f"feat_rope.freqs_{name}", values)
    model = LightningDiT(config)
    statistics = {"latent_mean": model.latent_mean, "latent_std": model.latent_std}
    load_strict(model, _rename(state, _GENERATOR_NAMES) | statistics, "released generator weights")
    return model.eval()


def _plain_names(released: Mapping[str, Any], holders: Iterable[str]) -> dict[str, Tensor]:
    for holder in holders:
        if isinstance(released.get(holder), Mapping):
            released = released[holder]
            break
    plain = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in released.items()}
    if strange := [name for name, value in plain.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"released weights must map names to tensors; not so: {', '.join(sorted(strange)[:5])}"
        )
    return plain


def _rename(state: Mapping[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed, left = {}, []
    for name, value in state.items():
        for pattern, replacement in names:
            new, hits = re.subn(f"^{pattern}", replacement, name)
            if hits:
                renamed[new] = value
                break
        else:
            left.append(name)
    if left:
        raise ValueError(f"released weights hold {len(left)} unknown names: {', '.join(sorted(left)[:5])}")
    return renamed


def _take_constant(state: dict[str, Tensor], name: str, ours: Tensor) -> None:
    """Drop a table that is computed here, once it is seen to be the same."""
    if name not in state:
        raise ValueError(f"released weights lack {name}")
    theirs = state.pop(name)
    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=1e-5):
        raise ValueError(
            f"{name} of the released weights is not the fixed sine-cosine table of this grid "
            f"(shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}); check image_size and the grid"
        )
