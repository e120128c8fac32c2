"""Frozen vision foundation models (VFMs): a table of facts and one adapter. A new encoder is a new row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.backbones import (
    EfficientNetTokens,
    RandomViT,
    TokenMerger,
    build_tower,
    convert_internvit,
    drop_norm_affine,
    load_pretrained,
)
from openpae.layers import to_grid, to_tokens
from openpae.storage import fingerprint
from openpae.weights import load_strict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What sets one VFM apart from the next."""

    family: Literal["transformers", "efficientnet-lite0", "random"] = "transformers"
    """Who builds the network."""
    model_class: str = ""
    """Class of the transformers package; empty for the other families."""
    repo: str = ""
    """Hub name of the weights; empty where they are no hub's."""
    stride: int
    """Input pixels per token and axis; images are resized so that every VFM yields the same token grid."""
    dim: int
    """Width D of the features."""
    num_heads: int
    """Attention heads of the VFM, which the modulator and the projector take over."""
    num_prefix_tokens: int = 0
    """CLS and register tokens in front of the patch tokens."""
    final_norm: str | None = "layernorm"
    """Its last norm, used without scale and shift: tokens then have zero mean and unit variance. None: the
    patch tokens come without one, and are normalised behind the VFM."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    merge: int = 1
    """Tokens of the VFM per axis that become one; the stride counts the merged ones."""
    merge_by: Literal["mean", "mlp"] = "mean"
    """How. The MLP's weights belong to a released tokenizer, and its output is taken as it is."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the class that replace those beside the weights."""
    asks_to_interpolate: bool = False
    """Whether the class fits its positions to another grid only where it is asked to."""
    shuffles: bool = False
    """Whether the class puts the tokens into the order of a noise that it is given."""
    other_parts: tuple[str, ...] = ()
    """How names begin that the weights may hold beside the vision tower's."""
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    """Turns the names of the hub's file into those of the class; None where the package does it."""


def _dinov2(size: str, dim: int, num_heads: int, *, registers: bool = True) -> EncoderSpec:
    return EncoderSpec(
        model_class="Dinov2WithRegistersModel" if registers else "Dinov2Model",
        repo=f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        stride=14,
        dim=dim,
        num_heads=num_heads,
        num_prefix_tokens=1 + 4 if registers else 1,
    )


def _dinov3(size: str, dim: int, num_heads: int) -> EncoderSpec:
    return EncoderSpec(
        model_class="DINOv3ViTModel",
        repo=f"facebook/dinov3-vit{size}-pretrain-lvd1689m",
        stride=16,
        dim=dim,
        num_heads=num_heads,
        num_prefix_tokens=1 + 4,
        final_norm="norm",
    )


def _siglip2(size: str, dim: int, num_heads: int) -> EncoderSpec:
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
    )


def _mae(size: str, patch: int, dim: int, num_heads: int) -> EncoderSpec:
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
    )


def _clip(size: str, patch: int, dim: int, num_heads: int) -> EncoderSpec:
    return EncoderSpec(
        model_class="CLIPVisionModel",
        repo=f"openai/clip-vit-{size}-patch{patch}",
        stride=patch,
        dim=dim,
        num_heads=num_heads,
        num_prefix_tokens=1,
        final_norm=None,  # its post_layernorm sees the CLS token only
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        asks_to_interpolate=True,
        other_parts=(
            *("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
            "embeddings.position_ids",  # 0, 1, 2, ...: older files hold it
        ),
    )


ENCODERS = {
    "dinov2-s": _dinov2("small", 384, 6),
    "dinov2-b": _dinov2("base", 768, 12),
    "dinov2-l": _dinov2("large", 1024, 16),
    "dinov2-g": _dinov2("giant", 1536, 24),
    "dinov2-s-noreg": _dinov2("small", 384, 6, registers=False),
    "dinov2-b-noreg": _dinov2("base", 768, 12, registers=False),
    "dinov2-l-noreg": _dinov2("large", 1024, 16, registers=False),
    "dinov2-g-noreg": _dinov2("giant", 1536, 24, registers=False),
    "dinov3-s": _dinov3("s16", 384, 6),
    "dinov3-b": _dinov3("b16", 768, 12),
    "dinov3-l": _dinov3("l16", 1024, 16),
    "dinov3-h": _dinov3("h16plus", 1280, 20),
    "siglip2-b": _siglip2("base", 768, 12),
    "siglip2-l": _siglip2("large", 1024, 16),
    "siglip2-so": _siglip2("so400m", 1152, 16),
    "mae-b": _mae("base", 16, 768, 12),
    "mae-l": _mae("large", 16, 1024, 16),
    "mae-h": _mae("huge", 14, 1280, 16),
    "clip-b": _clip("base", 16, 768, 12),
    "clip-l": _clip("large", 14, 1024, 16),
    # 448 pixels and 32 x 32 tokens for an image of 256, merged 2 x 2.
    "internvit-300m": EncoderSpec(
        model_class="InternVLVisionModel",
        repo="OpenGVLab/InternViT-300M-448px-V2_5",
        stride=28,
        dim=1024,
        num_heads=16,
        num_prefix_tokens=1,
        final_norm=None,
        merge=2,
        options={"attention_bias": True},  # the hub's config says it by another name
        convert=convert_internvit,
    ),
    # As the authors' released tokenizer has it, which alone holds the weights of the MLP.
    "internvit-300m-mlp": EncoderSpec(
        model_class="InternVLVisionModel",
        repo="OpenGVLab/InternViT-300M-448px-V2_5",
        stride=28,
        dim=1024,
        num_heads=16,
        num_prefix_tokens=1,
        final_norm=None,
        merge=2,
        merge_by="mlp",
        options={"attention_bias": True},
        convert=convert_internvit,
    ),
    # A CNN: block 10 (112 channels) beside block 15 (320 channels, upsampled), each normalised per token.
    "efficientnet-lite0": EncoderSpec(
        family="efficientnet-lite0",
        stride=16,
        dim=112 + 320,
        num_heads=8,
        image_mean=(127 / 255, 127 / 255, 127 / 255),
        image_std=(128 / 255, 128 / 255, 128 / 255),
    ),
    # Fixed random weights: for tests and for trying a command without a download.
    "random-tiny": EncoderSpec(family="random", stride=8, dim=48, num_heads=4, num_prefix_tokens=1),
}


class Encoder(Protocol):
    """What the tokenizer needs of a VFM; any nn.Module with these two can be passed to `PAE`."""

    @property
    def spec(self) -> EncoderSpec:
        """The facts of this encoder."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (B, N, D) of pixels (B, 3, h stride, w stride), normalised by the spec's mean and std."""
        ...


class FrozenEncoder(nn.Module):
    """A VFM that gives patch tokens and never changes.

    Args:
        spec: its row of the table.
        backbone: maps normalised pixels to tokens (B, P + N, D), P prefix tokens first, or to an output
            of the transformers package that holds them as `last_hidden_state`.
        trainable: let gradients flow and weights change: the finetuned VFM of Table 3(b).
    """

    def __init__(self, spec: EncoderSpec, backbone: nn.Module, *, trainable: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.trainable = trainable
        self.backbone = backbone
        self.merger = TokenMerger(spec.dim, spec.dim, spec.merge) if spec.merge_by == "mlp" else None
        self.eval().requires_grad_(trainable)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: training the whole tokenizer must not wake dropout in here."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: normalised, (B, 3, h stride, w stride). Returns features: (B, N, D), N = h w.

        Raises:
            ValueError: the backbone gives another number of tokens than its spec says.
        """
        spec = self.spec
        h, w = (side * spec.merge // spec.stride for side in pixels.shape[-2:])
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            output = self.backbone(pixels, **self._wishes(h * w, pixels))
            tokens: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
            tokens = tokens[:, spec.num_prefix_tokens :]
            if tokens.shape[1] != h * w:
                raise ValueError(
                    f"{type(self.backbone).__name__} gave {tokens.shape[1]} patch tokens for {h} x {w}; its "
                    f"stride or num_prefix_tokens = {spec.num_prefix_tokens} is not that of its row"
                )
            if self.merger is not None:
                return self.merger(tokens, h, w)  # type: ignore[no-any-return]
            if spec.merge > 1:
                tokens = to_tokens(F.avg_pool2d(to_grid(tokens, h, w), spec.merge))
            if spec.final_norm is None:
                tokens = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)
            return tokens

    def _wishes(self, count: int, pixels: Tensor) -> dict[str, Any]:
        """What the class must be told beside the pixels."""
        wishes: dict[str, Any] = {}
        if self.spec.asks_to_interpolate:
            wishes["interpolate_pos_encoding"] = True
        if self.spec.shuffles:  # tokens are sorted by this noise: a rising one leaves them where they are
            wishes["noise"] = torch.arange(count, device=pixels.device).expand(pixels.shape[0], -1)
        return wishes


class EncoderInput(nn.Module):
    """Images as a VFM wants them: resized so that each patch of the decoder is one token, and normalised.

    Args:
        spec: the VFM's facts.
        patch_size: pixels per token and axis of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: EncoderSpec, patch_size: int) -> None:
        super().__init__()
        self.stride, self.patch_size = spec.stride, patch_size
        for name, values in (("mean", spec.image_mean), ("std", spec.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images in [0, 1]: (B, 3, H, W). Returns pixels: (B, 3, h stride, w stride), normalised.

        Raises:
            ValueError: integer pixels, or H or W is not a multiple of the patch size.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be float in [0, 1], got {images.dtype}; divide uint8 by 255")
        height, width = images.shape[-2:]
        if images.shape[1] != 3 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images must be (B, 3, H, W) with H and W multiples of {self.patch_size}, "
                f"got {tuple(images.shape)}"
            )
        size = (height // self.patch_size * self.stride, width // self.patch_size * self.stride)
        if size != (height, width):
            images = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False)
        return (images - self.mean) / self.std


def encoder_spec(name: str) -> EncoderSpec:
    """A row of the table.

    Raises:
        ValueError: no such row.
    """
    if name not in ENCODERS:
        raise ValueError(
            f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}, or pass a module of your own"
        )
    return ENCODERS[name]


def load_encoder(
    name: str,
    source: str | None = None,
    *,
    trainable: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> FrozenEncoder:
    """Build a VFM of the table with its pretrained weights.

    Args:
        name: a row of `ENCODERS`.
        source: hub name or local folder to take the weights from, in place of the row's own.
        trainable: let it be finetuned.
        state: the weights under the names of a FrozenEncoder, where they are at hand: the source (which may
            then also be a file of what `encoder_architecture` gives) is asked for the architecture alone.
            Behind "backbone." follow names of the hub's file, of the class or of its earlier versions; the
            last norm's may be missing.

    Raises:
        ValueError: an unknown name, a source for a row that takes none, or weights that do not fit.
        FileNotFoundError: the weights can not be had.
    """
    spec = encoder_spec(name)
    if source is not None and spec.family != "transformers":
        raise ValueError(f"encoder {name!r} takes its weights from a package, so encoder_source must be null")
    if spec.merge_by == "mlp" and state is None:
        raise ValueError(
            f"encoder {name!r} has an MLP whose weights only a released tokenizer holds; import one with pae "
            "import-official, or train with internvit-300m"
        )
    inner, outer = _parted(state)
    backbone = _backbone(spec, lambda: _pretrained(spec, source or spec.repo, inner), state is None)
    if inner is not None and spec.family != "transformers":
        load_strict(backbone, inner, f"weights of the encoder {name!r}")
    encoder = FrozenEncoder(spec, backbone, trainable=trainable)
    if state is not None:
        own = {f"backbone.{key}": value for key, value in encoder.backbone.state_dict().items()}
        load_strict(encoder, own | outer, f"weights of the encoder {name!r}")
    return encoder


def empty_encoder(
    name: str, architecture: Mapping[str, Any] | None = None, *, trainable: bool = False
) -> FrozenEncoder:
    """A VFM of the table whose weights are still to be loaded: nothing is fetched.

    Args:
        name: a row of `ENCODERS`.
        architecture: what `encoder_architecture` gives, read; rows of the transformers package need it.
        trainable: let it be finetuned.

    Raises:
        ValueError: an unknown name.
    """
    spec = encoder_spec(name)
    backbone = _backbone(spec, lambda: build_tower(spec.model_class, architecture or {}), pretrained=False)
    return FrozenEncoder(spec, backbone, trainable=trainable)


def encoder_fingerprint(encoder: Encoder) -> str:
    """Fingerprint of a frozen encoder: its weights, and what its spec says of their input and output.

    The names of the weights do not count: the transformers package has renamed them more than once.

    Raises:
        TypeError: the encoder is no nn.Module, so it has no weights to name.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be an nn.Module, got {type(encoder).__name__}")
    spec = encoder.spec
    facts = (spec.stride, spec.num_prefix_tokens, spec.image_mean, spec.image_std)
    return fingerprint({}, repr(facts), *sorted(fingerprint({"": w}) for w in encoder.state_dict().values()))


def encoder_architecture(encoder: Encoder | None) -> dict[str, Any] | None:
    """What the transformers package needs to build an encoder anew, as plain data; None for others."""
    if not isinstance(encoder, FrozenEncoder) or encoder.spec.family != "transformers":
        return None
    config: Any = encoder.backbone.config
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    del plain["_name_or_path"]  # where it came from on this machine
    return plain


def _parted(state: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
    """The backbone's weights, under its own names, and the others."""
    if state is None:
        return None, {}
    inner = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
    return inner, {key: value for key, value in state.items() if not key.startswith("backbone.")}


def _backbone(spec: EncoderSpec, tower: Callable[[], nn.Module], pretrained: bool) -> nn.Module:
    if spec.family == "efficientnet-lite0":
        return EfficientNetTokens(pretrained=pretrained)
    if spec.family == "random":
        return RandomViT(spec.dim, spec.stride, spec.num_heads)
    built = tower()
    if spec.final_norm is not None:
        drop_norm_affine(built, spec.final_norm)
    return built


def _pretrained(spec: EncoderSpec, source: str, state: Mapping[str, Tensor] | None) -> nn.Module:
    if state is not None and spec.final_norm is not None:  # its scale and shift are dropped anyway
        ones = torch.ones(spec.dim)
        state = {**state, f"{spec.final_norm}.weight": ones, f"{spec.final_norm}.bias": 0 * ones}
    model = load_pretrained(
        spec.model_class,
        source,
        state=state,
        options=spec.options,
        other_parts=spec.other_parts,
        convert=spec.convert,
    )
    patch = model.config.patch_size
    facts = {
        "width": (model.config.hidden_size, spec.dim),
        "patch": (patch if isinstance(patch, int) else patch[0], spec.stride // spec.merge),
    }
    for what, (found, expected) in facts.items():
        if found != expected:
            raise ValueError(
                f"weights at {source!r} are of {what} {found}, but the encoder's row says {expected}; "
                "name the row of their size"
            )
    tower: nn.Module = model
    return tower
