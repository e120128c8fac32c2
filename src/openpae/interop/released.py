"""Import of released weights by explicit maps of names: PAE's tokenizers and generators, LightningDiT of
VA-VAE, and DiT-DH of RAE."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openpae.models.configs import (
    DecoderConfig,
    DiTDHConfig,
    GeneratorConfig,
    HeadConfig,
    LightningDiTConfig,
    PAEConfig,
)
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH
from openpae.models.encoders import Encoder, FrozenEncoder, load_encoder
from openpae.models.generator import LatentGenerator
from openpae.models.layers import rope_2d, sincos_2d
from openpae.models.tokenizer import PAE
from openpae.storage.weights import load_strict, read_tensors, some

# Names of the authors' release -> names here. The first match counts; a name without a match is an error.
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
    # The VFM under the names of the transformers package; MAE has another prefix. InternViT has an MLP beside
    # it: norm, linear layer, GELU, linear layer.
    (r"encoder\.(encoder|model)\.", "encoder.backbone."),
    (r"encoder\.mlp1\.0\.", "encoder.merger.norm."),
    (r"encoder\.mlp1\.1\.", "encoder.merger.fc1."),
    (r"encoder\.mlp1\.3\.", "encoder.merger.fc2."),
]
_LIGHTNING_NAMES = [
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.mlp\.", "time_mlp."),
    (r"y_embedder\.embedding_table\.", "class_embed."),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.modulation."),
    (r"blocks\.(\d+)\.(norm1|norm2|attn|mlp)\.", r"blocks.\1.\2."),
    (r"final_layer\.adaLN_modulation\.1\.", "final_modulation."),
    (r"final_layer\.norm_final\.", "final_norm."),
    (r"final_layer\.linear\.", "to_velocity."),
]
# The embedding of RAE's head is named `x`, that of its DiT `s`; one list holds the blocks of both.
_DITDH_NAMES = [
    (r"s_embedder\.proj\.", "patch_embed."),
    (r"x_embedder\.proj\.", "head_embed."),
    (r"s_projector\.", "to_head."),
    (r"t_embedder\.W$", "frequencies"),
    *_LIGHTNING_NAMES[1:],
]
# Width of a decoder -> attention heads, for the paper's sizes B, L and XL; no tensor has them.
_DECODER_HEADS = {768: 12, 1024: 16, 1152: 16}


def released_kind(released: Mapping[str, Any]) -> Literal["tokenizer", "generator"]:
    """The kind of model in a released file.

    Raises:
        ValueError: the file holds neither kind.
    """
    held = [released[key] for key in ("model", "ema") if isinstance(released.get(key), Mapping)] or [released]
    names = {_plain(name) for state in held for name in state}
    if any(name.startswith("latent_compressor.") for name in names):
        return "tokenizer"
    if "x_embedder.proj.weight" in names:
        return "generator"
    raise ValueError(
        "the file holds neither a tokenizer nor a generator that is known; its names: "
        f"{some(sorted(names)) or 'none'}"
    )


def released_tokenizer_config(
    released: Mapping[str, Any], encoder: str, source: str | None = None, decoder_heads: int | None = None
) -> PAEConfig:
    """The config of a released tokenizer, from the shapes of its weights.

    Args:
        released: content of the file; see `import_tokenizer`.
        encoder: the VFM, a row of `ENCODERS`; the weights do not name it.
        source: hub name or local folder with its config; None: that of the row.
        decoder_heads: attention heads of the decoder; None: those of the paper's sizes.

    Raises:
        ValueError: a tensor is missing, or decoder_heads is None and the decoder has no size of the paper.
    """
    state = _plain_names(released, ("model",))
    to_latent = _shape(state, "latent_compressor.1.weight", 2, 4)
    embed = _shape(state, "decoder.decoder_embed.weight", 2)
    patch = math.isqrt(_shape(state, "decoder.decoder_pred.weight", 2)[0] // 3)
    if decoder_heads is None:
        if embed[0] not in _DECODER_HEADS:
            known = ", ".join(map(str, _DECODER_HEADS))
            raise ValueError(
                f"the decoder is {embed[0]} wide, none of the paper's ({known}), and its weights do not "
                "show the number of attention heads; give decoder_heads"
            )
        decoder_heads = _DECODER_HEADS[embed[0]]
    decoder = DecoderConfig(
        hidden_dim=embed[0],
        num_layers=_count(state, r"decoder\.decoder_layers\.(\d+)\."),
        num_heads=decoder_heads,
        mlp_dim=_shape(state, "decoder.decoder_layers.0.intermediate.dense.weight", 2)[0],
        patch_size=patch,
    )
    return PAEConfig(
        encoder=encoder,
        encoder_source=source,
        image_size=patch * math.isqrt(_shape(state, "delta_encoder.pos_embed", 3)[1]),
        latent_dim=to_latent[0],
        modulator_layers=_count(state, r"delta_encoder\.layers\.(\d+)\."),
        decoder=decoder,
    )


def import_tokenizer(released: Mapping[str, Any], config: PAEConfig, encoder: Encoder | None = None) -> PAE:
    """The authors' tokenizer weights as a `PAE`, which is saved with its encoder's weights.

    Args:
        released: content of the file: the state dict, or a mapping with the state dict as "model". Prefixes
            "module." and "_orig_mod." of names are ignored.
        config: sizes of the released model; see `released_tokenizer_config`.
        encoder: your own VFM of the architecture in the file; its weights are replaced. None: the encoder of
            the config, of which only the architecture is downloaded.

    Raises:
        ValueError: a key is missing, unknown or of another shape, or fixed positions differ from `sincos_2d`.
        FileNotFoundError: the encoder's architecture cannot be loaded.
    """
    state = _plain_names(released, ("model",))
    grid, width = config.grid_shape, config.decoder.hidden_dim
    dim = config.width or _shape(state, "latent_compressor.1.weight", 2, 4)[1]
    _take_constant(state, "delta_encoder.pos_embed", sincos_2d(*grid, dim)[None])
    with_cls = torch.cat([torch.zeros(1, width), sincos_2d(*grid, width)])[None]
    _take_constant(state, "decoder.decoder_pos_embed", with_cls)
    renamed = _rename(state, _TOKENIZER_NAMES)
    for index in range(config.decoder.num_layers):
        for kind in ("weight", "bias"):
            parts = [f"decoder.blocks.{index}.attn.{name}.{kind}" for name in ("query", "key", "value")]
            if all(part in renamed for part in parts):
                fused = torch.cat([renamed.pop(part) for part in parts])
                renamed[f"decoder.blocks.{index}.attn.qkv.{kind}"] = fused
    if encoder is None:
        vfm = {name: value for name, value in renamed.items() if name.startswith("encoder.")}
        renamed = {name: value for name, value in renamed.items() if name not in vfm}
        vfm = {name.removeprefix("encoder."): value for name, value in vfm.items()}
        trainable = config.fusion == "finetune"
        encoder = load_encoder(config.encoder, config.encoder_source, trainable=trainable, state=vfm)
        renamed |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    model = PAE(config, encoder)
    load_strict(model, renamed, "released tokenizer weights")
    model.keeps_encoder = isinstance(encoder, FrozenEncoder)
    return model.eval()


def released_generator_config(released: Mapping[str, Any]) -> GeneratorConfig:
    """The config of a released generator, from the shapes of its weights.

    Raises:
        ValueError: a tensor is missing.
    """
    state = _plain_names(released, ("ema", "model"))
    wide = "s_embedder.proj.weight" in state
    embed, rope = ("s_embedder", "enc_feat_rope") if wide else ("x_embedder", "feat_rope")
    dim, channels, patch, _ = _shape(state, f"{embed}.proj.weight", 4)
    shared: dict[str, Any] = {
        "latent_dim": channels,
        "grid_size": patch * math.isqrt(_shape(state, "pos_embed", 3)[1]),
        "patch_size": patch,
        "hidden_dim": dim,
        "num_heads": dim // _shape(state, f"{rope}.freqs_cos", 2)[1],
        "num_classes": _shape(state, "y_embedder.embedding_table.weight", 2)[0] - 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    blocks = _count(state, r"blocks\.(\d+)\.")
    if not wide:
        return LightningDiTConfig(num_layers=blocks, **shared)
    width = _shape(state, "x_embedder.proj.weight", 4)[0]
    widths = [_shape(state, f"blocks.{index}.norm1.weight", 1)[0] for index in range(blocks)]
    # If head and DiT have the same width, the shapes do not separate their blocks.
    layers = sum(w == width for w in widths) if width != dim else HeadConfig().num_layers
    head = HeadConfig(
        hidden_dim=width, num_layers=layers, num_heads=width // _shape(state, "dec_feat_rope.freqs_cos", 2)[1]
    )
    return DiTDHConfig(num_layers=blocks - layers, head=head, **shared)


def import_generator(released: Mapping[str, Any], config: GeneratorConfig) -> LatentGenerator:
    """A generator with released LightningDiT or DiT-DH weights; its latent statistics stay at 0 and 1.

    Args:
        released: content of the file: the state dict, or a mapping with it as "ema" (preferred) or "model".
        config: sizes of the released model; see `released_generator_config`.

    Raises:
        ValueError: a key is missing, unknown or of another shape, or fixed positions differ from `sincos_2d`
            and `rope_2d`.
    """
    state = _plain_names(released, ("ema", "model"))
    grid, dim = config.token_grid, config.hidden_dim
    _take_constant(state, "pos_embed", sincos_2d(*grid, dim)[None])
    if isinstance(config, LightningDiTConfig):
        _take_rope(state, "feat_rope", grid, dim // config.num_heads)
        return _loaded(LightningDiT(config), _rename(state, _LIGHTNING_NAMES))
    _take_rope(state, "enc_feat_rope", grid, dim // config.num_heads)
    _take_rope(state, "dec_feat_rope", grid, config.head.hidden_dim // config.head.num_heads)
    renamed: dict[str, Tensor] = {}
    for name, value in _rename(state, _DITDH_NAMES).items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and (behind := int(block[1]) - config.num_layers) >= 0:
            name = f"head_blocks.{behind}.{name[block.end() :]}"
        # RAE's velocity points from data to noise.
        renamed[name] = -value if name.startswith("to_velocity.") else value
    return _loaded(DiTDH(config), renamed)


def _loaded(generator: LatentGenerator, weights: Mapping[str, Tensor]) -> LatentGenerator:
    statistics = {"latent_mean": generator.latent_mean, "latent_std": generator.latent_std}
    load_strict(generator, {**weights, **statistics}, "released generator weights")
    return generator.eval()


def read_statistics(file: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents from a released file, for `set_statistics`.

    The file holds "mean" and "std" per channel, (1, C, 1, 1) (LightningDiT, PAE), or "mean" and "var" per
    channel and cell, (C, h, w) (RAE, which adds 1e-5 to the variance).

    Returns:
        Two tensors (C,) or (C, h, w).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, see `read_tensors`, or has other content.
    """
    tensors = read_tensors(file)
    real = all(isinstance(value, Tensor) and value.is_floating_point() for value in tensors.values())
    if tensors.keys() not in ({"mean", "std"}, {"mean", "var"}) or not real:
        raise ValueError(
            f"{file} must hold the tensors mean and std (or mean and var), of floats, got "
            f"{', '.join(sorted(map(str, tensors)))}"
        )
    if "var" in tensors:
        tensors = {"mean": tensors["mean"], "std": (tensors["var"] + 1e-5).sqrt()}
    mean, std = (value.float() for value in (tensors["mean"], tensors["std"]))
    mean, std = (value[0] if value.ndim == 4 and len(value) == 1 else value for value in (mean, std))
    flat = mean.shape[1:] == (1, 1)
    return (mean.flatten(), std.flatten()) if flat else (mean, std)


def _plain_names(released: Mapping[str, Any], holders: Iterable[str]) -> dict[str, Tensor]:
    """The state dict of a released file, under the first of the holders that exists, or the file itself."""
    for holder in holders:
        if isinstance(released.get(holder), Mapping):
            released = released[holder]
            break
    plain = {_plain(name): value for name, value in released.items()}
    if strange := [name for name, value in plain.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"released weights must map names to tensors; not so: {', '.join(sorted(strange)[:5])}"
        )
    return plain


def _plain(name: str) -> str:
    """A name without the prefixes of distributed and compiled modules."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def _rename(state: Mapping[str, Tensor], names: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
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


def _take_rope(state: dict[str, Tensor], name: str, grid: tuple[int, int], head_dim: int) -> None:
    for part, values in zip(("cos", "sin"), rope_2d(*grid, head_dim), strict=True):
        _take_constant(state, f"{name}.freqs_{part}", values)


def _take_constant(state: dict[str, Tensor], name: str, expected: Tensor) -> None:
    """Drop a fixed table from the state after a check against the computed table."""
    if name not in state:
        raise ValueError(f"released weights lack {name}")
    table = state.pop(name)
    same = table.is_floating_point() and table.shape == expected.shape
    if not same or not torch.allclose(table.float(), expected, atol=1e-5):
        raise ValueError(
            f"{name} of the released weights is not the fixed sine-cosine table of this grid "
            f"(shape {tuple(table.shape)}, expected {tuple(expected.shape)}); check image_size and the grid"
        )


def _shape(state: Mapping[str, Tensor], name: str, *axes: int) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"released weights lack {name}")
    shape = tuple(state[name].shape)
    if len(shape) not in axes or 0 in shape:
        allowed = " or ".join(map(str, axes))
        raise ValueError(
            f"{name} of the released weights must have {allowed} axes, none of them empty, got {shape}"
        )
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """The number of layers: 1 + the largest number in the group of the pattern."""
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)
