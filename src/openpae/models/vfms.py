"""The table of vision foundation models (VFMs). A new encoder is a new row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The facts of one VFM."""

    family: Literal["transformers", "efficientnet-lite0", "random"] = "transformers"
    """The builder of the network: the transformers package, or a class of `backbones.py`."""
    model_class: str = ""
    """Class of the transformers package; empty for the other families."""
    repo: str = ""
    """Hub name of the weights; empty if they are not on the hub."""
    stride: int
    """Input pixels per token along each axis; images are resized so that every VFM gives the same grid."""
    dim: int
    """Width D of the features."""
    num_heads: int
    """Attention heads of the VFM, of the modulator and of the projectors."""
    num_prefix_tokens: int = 0
    """CLS and register tokens in front of the patch tokens."""
    final_norm: str | None = "layernorm"
    """The last norm, used without scale and shift, so that tokens have zero mean and unit variance. None: the
    patch tokens have no last norm, and are normalised after the VFM."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    merge: int = 1
    """Tokens of the VFM per axis that become one; the stride is that of merged tokens."""
    layers: int = 1
    """Number K of last layers whose outputs are summed (RAEv2, arXiv:2605.18324), before the last norm."""
    merge_by: Literal["mean", "mlp"] = "mean"
    """How tokens merge. The weights of the MLP come with a released tokenizer; its output is not
    normalised."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the class that replace those of the config beside the weights."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """The published sizes, as settings of the class, for `empty_encoder`."""
    asks_to_interpolate: bool = False
    """The class interpolates its positions only if an argument asks for it."""
    shuffles: bool = False
    """The class sorts the tokens by a noise argument."""
    other_parts: tuple[str, ...] = ()
    """Prefixes of names that the file may hold beside those of the vision tower."""
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    """Maps the names of the hub's file to those of the class; None: the package does it."""


def _vit(
    dim: int, layers: int, num_heads: int, mlp: int, patch: int, image: int, **more: Any
) -> dict[str, Any]:
    """Sizes of a ViT under the usual names of the transformers package."""
    return {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": num_heads,
        "intermediate_size": mlp,
        "patch_size": patch,
        "image_size": image,
        **more,
    }


def _dinov2(size: str, dim: int, layers: int, num_heads: int, *, registers: bool = True) -> EncoderSpec:
    return EncoderSpec(
        model_class="Dinov2WithRegistersModel" if registers else "Dinov2Model",
        repo=f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        stride=14,
        dim=dim,
        num_heads=num_heads,
        num_prefix_tokens=1 + 4 if registers else 1,
        architecture=_vit(dim, layers, num_heads, 4 * dim, 14, 518, use_swiglu_ffn=size == "giant"),
    )


def _dinov3(size: str, dim: int, layers: int, num_heads: int) -> EncoderSpec:
    return EncoderSpec(
        model_class="DINOv3ViTModel",
        repo=f"facebook/dinov3-vit{size}-pretrain-lvd1689m",
        stride=16,
        dim=dim,
        num_heads=num_heads,
        num_prefix_tokens=1 + 4,
        final_norm="norm",
        architecture=_vit(
            *(dim, layers, num_heads, 4 * dim, 16, 224),
            num_register_tokens=4,
            key_bias=False,
            use_gated_mlp=size == "h16plus",
            hidden_act="silu" if size == "h16plus" else "gelu",
        ),
    )


def _siglip2(size: str, dim: int, layers: int, num_heads: int, mlp: int) -> EncoderSpec:
    return EncoderSpec(
        model_class="SiglipVisionModel",  # SigLIP 2 of a fixed size has SigLIP's architecture
        repo=f"google/siglip2-{size}-patch16-256",
        stride=16,
        dim=dim,
        num_heads=num_heads,
        final_norm="post_layernorm",
        image_mean=HALF,
        image_std=HALF,
        options={"vision_use_head": False},
        asks_to_interpolate=True,
        other_parts=("head.", "text_model.", "logit_scale", "logit_bias"),
        architecture=_vit(dim, layers, num_heads, mlp, 16, 256),
    )


def _mae(size: str, patch: int, dim: int, layers: int, num_heads: int) -> EncoderSpec:
    return EncoderSpec(
        model_class="ViTMAEModel",
        repo=f"facebook/vit-mae-{size}",
        stride=patch,
        dim=dim,
        num_heads=num_heads,
        num_prefix_tokens=1,
        options={"mask_ratio": 0.0},
        asks_to_interpolate=True,
        shuffles=True,
        other_parts=("decoder.",),
        architecture=_vit(dim, layers, num_heads, 4 * dim, patch, 224),
    )


def _clip(size: str, patch: int, dim: int, layers: int, num_heads: int) -> EncoderSpec:
    return EncoderSpec(
        model_class="CLIPVisionModel",
        repo=f"openai/clip-vit-{size}-patch{patch}",
        stride=patch,
        dim=dim,
        num_heads=num_heads,
        num_prefix_tokens=1,
        final_norm=None,  # its post_layernorm normalises only the CLS token
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        asks_to_interpolate=True,
        other_parts=(
            *("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
            "embeddings.position_ids",  # 0, 1, 2, ...; only in older files
        ),
        architecture=_vit(dim, layers, num_heads, 4 * dim, patch, 224),
    )


def _convert_internvit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from openpae.models.backbones import convert_internvit  # needs torch, which this file does not import

    return convert_internvit(state)


_INTERNVIT = EncoderSpec(
    model_class="InternVLVisionModel",
    repo="OpenGVLab/InternViT-300M-448px-V2_5",
    stride=28,
    dim=1024,
    num_heads=16,
    num_prefix_tokens=1,
    final_norm=None,
    merge=2,
    options={"attention_bias": True},  # has another name in the hub's config
    architecture=_vit(1024, 24, 16, 4096, 14, 448, use_mask_token=False),
    convert=_convert_internvit,
)


ENCODERS = {
    "dinov2-s": _dinov2("small", 384, 12, 6),
    "dinov2-b": _dinov2("base", 768, 12, 12),
    "dinov2-l": _dinov2("large", 1024, 24, 16),
    "dinov2-g": _dinov2("giant", 1536, 40, 24),
    "dinov2-s-noreg": _dinov2("small", 384, 12, 6, registers=False),
    "dinov2-b-noreg": _dinov2("base", 768, 12, 12, registers=False),
    "dinov2-l-noreg": _dinov2("large", 1024, 24, 16, registers=False),
    "dinov2-g-noreg": _dinov2("giant", 1536, 40, 24, registers=False),
    "dinov3-s": _dinov3("s16", 384, 12, 6),
    "dinov3-b": _dinov3("b16", 768, 12, 12),
    "dinov3-l": _dinov3("l16", 1024, 24, 16),
    "dinov3-h": _dinov3("h16plus", 1280, 32, 20),
    "siglip2-b": _siglip2("base", 768, 12, 12, 3072),
    "siglip2-l": _siglip2("large", 1024, 24, 16, 4096),
    "siglip2-so": _siglip2("so400m", 1152, 27, 16, 4304),
    "mae-b": _mae("base", 16, 768, 12, 12),
    "mae-l": _mae("large", 16, 1024, 24, 16),
    "mae-h": _mae("huge", 14, 1280, 32, 16),
    "clip-b": _clip("base", 16, 768, 12, 12),
    "clip-l": _clip("large", 14, 1024, 24, 16),
    # 448 pixels and 32 x 32 tokens for an image of 256, merged 2 x 2.
    "internvit-300m": _INTERNVIT,
    # The encoder of the authors' released tokenizer; only that file holds the weights of the MLP.
    "internvit-300m-mlp": replace(_INTERNVIT, merge_by="mlp"),
    # A CNN: blocks 10 (112 channels) and 15 (320 channels, upsampled) concatenated, each normalised per
    # token.
    "efficientnet-lite0": EncoderSpec(
        family="efficientnet-lite0",
        stride=16,
        dim=112 + 320,
        num_heads=8,
        image_mean=(127 / 255, 127 / 255, 127 / 255),
        image_std=(128 / 255, 128 / 255, 128 / 255),
    ),
    # Fixed random weights, for tests and for trials without a download.
    "random-tiny": EncoderSpec(family="random", stride=8, dim=48, num_heads=4, num_prefix_tokens=1),
}


def encoder_spec(name: str) -> EncoderSpec:
    """A row of the table. NAME+K is the row with the sum of its last K layers.

    Raises:
        ValueError: no such row, or K is no number from 1 on.
    """
    row, plus, layers = name.partition("+")
    if row not in ENCODERS:
        raise ValueError(
            f"unknown encoder {row!r}; known: {', '.join(ENCODERS)}, or pass a module of your own"
        )
    if plus and (not layers.isdecimal() or int(layers) < 1):
        raise ValueError(f"{name!r} must be NAME+K with K >= 1, the number of last layers to sum")
    return replace(ENCODERS[row], layers=int(layers)) if plus else ENCODERS[row]
