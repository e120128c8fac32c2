"""Every family of the table of encoders at tiny size, built from a config of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from openpae.models.vfms import ENCODERS

VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT = {**VIT, "num_hidden_layers": 1, "vocab_size": 20, "max_position_embeddings": 4}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family is built at tiny size, and the names of its weights."""

    row: str
    """The row of the table that the tiny row copies."""
    build: Callable[[], Any]
    """Builds the model of the hub's file, for 4 x 4 tokens (8 x 8 before a merge)."""
    tower: Callable[[Any], Any] = lambda model: model
    """The encoder inside of that model."""
    positions: str | None = "embeddings.position_embeddings"
    """Name of the table of positions; None where they are computed."""
    antialias: bool = False
    """Whether the package interpolates the table with antialias, as DINOv2's code does with registers."""


def siglip() -> Any:
    vision = {**VIT, "image_size": 64, "patch_size": 16}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=TEXT))


def clip() -> Any:
    vision = {**VIT, "image_size": 64, "patch_size": 16}
    config = transformers.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=8)
    return transformers.CLIPModel(config)


def mae() -> Any:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(
        **VIT, **decoder, decoder_intermediate_size=16, image_size=64, hidden_dropout_prob=0.5
    )
    return transformers.ViTMAEForPreTraining(config)


def dinov3() -> Any:
    config = transformers.DINOv3ViTConfig(
        **VIT, image_size=64, patch_size=16, num_register_tokens=4, drop_path_rate=0.5, pos_embed_jitter=2.0
    )
    return transformers.DINOv3ViTModel(config)


def dinov2(model: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{model}Config")(
        **{key: value for key, value in VIT.items() if key != "intermediate_size"},
        image_size=56,
        patch_size=14,
        hidden_dropout_prob=0.5,
        **changes,
    )
    return getattr(transformers, f"{model}Model")(config)


def internvit() -> Any:
    config = transformers.InternVLVisionConfig(
        **VIT, image_size=112, attention_bias=True, hidden_dropout_prob=0.5
    )
    return transformers.InternVLVisionModel(config)


FAMILIES = [
    Family(
        row="dinov2-l",
        build=lambda: dinov2("Dinov2WithRegisters", num_register_tokens=4),
        antialias=True,
    ),
    Family(row="dinov2-l-noreg", build=lambda: dinov2("Dinov2")),
    Family(
        row="dinov2-g",
        build=lambda: dinov2("Dinov2WithRegisters", num_register_tokens=4, use_swiglu_ffn=True),
        antialias=True,
    ),
    Family(row="dinov3-l", build=dinov3, positions=None),
    Family(
        row="siglip2-so",
        build=siglip,
        tower=lambda model: model.vision_model,
        positions="embeddings.position_embedding.weight",
    ),
    Family(row="mae-l", build=mae, tower=lambda model: model.vit),
    Family(
        row="clip-b",
        build=clip,
        tower=lambda model: model.vision_model,
        positions="embeddings.position_embedding.weight",
    ),
    Family(row="internvit-300m", build=internvit),
]


def made(family: Family) -> Any:
    """The model with random numbers in place of zeros and ones, so that every part has an effect."""
    torch.manual_seed(0)
    hub_model = family.build().eval()
    with torch.no_grad():
        for parameter in hub_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return hub_model


def saved(family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Save the model, and add a row "tiny" for it to the table."""
    hub_model = made(family)
    hub_model.save_pretrained(folder)
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS[family.row], dim=24, num_heads=2))
    return hub_model


def reference(family: Family, tower: Any, pixels: Tensor, layers: int = 1) -> Tensor:
    """Features by the package's class: the sum of its last hidden states, without scale and shift."""
    spec = ENCODERS[family.row]
    options: dict[str, Any] = {"output_hidden_states": True}
    options |= {"interpolate_pos_encoding": True} if family.row[:3] in ("sig", "cli", "mae") else {}
    if family.row == "mae-l":
        tower.config.mask_ratio = 0.0
    with torch.no_grad():
        output = tower(pixels, **options)
    hidden = torch.stack(output.hidden_states[-layers:]).sum(dim=0)
    tokens = hidden[:, spec.num_prefix_tokens :]
    if family.row == "mae-l":  # the class shuffles them, and returns their order
        tokens = tokens.gather(1, output.ids_restore[..., None].expand_as(tokens))
    tokens = np.asarray(tokens, dtype=np.float64)
    if family.row == "internvit-300m":
        h, w = (side // 28 for side in pixels.shape[-2:])
        tokens = tokens.reshape(len(tokens), h, 2, w, 2, -1).mean((2, 4)).reshape(len(tokens), h * w, -1)
    centred = tokens - tokens.mean(-1, keepdims=True)
    return torch.from_numpy(centred / centred.std(-1, keepdims=True)).float()


HUB_INTERNVIT = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
}


def under_hub_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InternViT's weights under the names of the hub's file, queries, keys and values in one tensor."""
    hub: dict[str, Tensor] = {}
    for name, value in state.items():
        for ours, theirs in HUB_INTERNVIT.items():
            name = name.replace(ours, theirs)
        hub[name] = value
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [hub.pop(f"encoder.layers.{layer}.attention.{part}_proj.{kind}") for part in "qkv"]
            hub[f"encoder.layers.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    return hub
