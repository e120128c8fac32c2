"""Models under the names of released files: inverse to the importer, and written without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH
from openpae.models.generator import LatentGenerator
from openpae.models.layers import rope_2d, sincos_2d
from openpae.models.tokenizer import PAE
from openpae.models.vfms import ENCODERS
from tests.models.families import under_hub_names

# Names of a generator here -> in releases, by their beginnings.
_GENERATOR_NAMES = [
    ("patch_embed.", "x_embedder.proj."),
    ("time_mlp.", "t_embedder.mlp."),
    ("class_embed.", "y_embedder.embedding_table."),
    ("final_modulation.", "final_layer.adaLN_modulation.1."),
    ("final_norm.", "final_layer.norm_final."),
    ("to_velocity.", "final_layer.linear."),
    ("blocks.", "blocks."),
]
_DITDH_NAMES = [
    ("patch_embed.", "s_embedder.proj."),
    ("head_embed.", "x_embedder.proj."),
    ("to_head.", "s_projector."),
    ("frequencies", "t_embedder.W"),
    ("head_blocks.", "blocks."),
    *_GENERATOR_NAMES[1:],
]


def under_their_names(model: PAE) -> dict[str, Tensor]:
    """A tokenizer as the authors' release holds it, inverse to the importer and written without it."""
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
        ("encoder.merger.", "encoder.mlp1."),
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


def _renamed(model: LatentGenerator, names: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, Tensor]]:
    """The beginning of each name, the name in releases, and the weight."""
    for name, value in model.state_dict().items():
        if not name.startswith("latent_"):
            ours, theirs = next(pair for pair in names if name.startswith(pair[0]))
            rest = name.removeprefix(ours).replace(".modulation.", ".adaLN_modulation.1.")
            yield ours, theirs + rest, value


def generator_under_their_names(model: LightningDiT) -> dict[str, Tensor]:
    """A LightningDiT as the authors' release holds it."""
    theirs = {name: value for _, name, value in _renamed(model, _GENERATOR_NAMES)}
    config = model.config
    grid, head = config.token_grid, config.hidden_dim // config.num_heads
    theirs["pos_embed"] = sincos_2d(*grid, config.hidden_dim)[None]
    theirs["feat_rope.freqs_cos"], theirs["feat_rope.freqs_sin"] = rope_2d(*grid, head)
    return theirs


def ditdh_under_their_names(model: DiTDH) -> dict[str, Tensor]:
    """A DiT-DH as RAE's release holds it: one list of blocks, the opposite velocity."""
    config = model.config
    theirs: dict[str, Tensor] = {}
    for ours, name, value in _renamed(model, _DITDH_NAMES):
        if ours == "head_blocks.":
            _, number, rest = name.split(".", 2)
            name = f"blocks.{int(number) + config.num_layers}.{rest}"
        theirs[name] = -value if ours == "to_velocity." else value
    theirs["pos_embed"] = sincos_2d(*config.token_grid, config.hidden_dim)[None]
    for part, width, heads in (
        ("enc", config.hidden_dim, config.num_heads),
        ("dec", config.head.hidden_dim, config.head.num_heads),
    ):
        cos, sin = rope_2d(*config.token_grid, width // heads)
        theirs |= {f"{part}_feat_rope.freqs_cos": cos, f"{part}_feat_rope.freqs_sin": sin}
    return theirs


def backbone_under_their_names(row: str, model: Any, folder: Path) -> dict[str, Tensor]:
    """The VFM as the authors' classes hold it: names of transformers 4, or of InternViT's own code; without
    the last norm, which they drop; with SigLIP's pooling head, which they keep."""
    model.save_pretrained(folder)  # under the names of transformers 4, as on the hub
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    part = {"siglip2-so": "vision_model.", "mae-l": "vit."}.get(row, "")
    state = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
    if row == "internvit-300m-mlp":
        state = under_hub_names(state)
    norm = ENCODERS[row].final_norm
    return {name: value for name, value in state.items() if norm is None or not name.startswith(f"{norm}.")}
