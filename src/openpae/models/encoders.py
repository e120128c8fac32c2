"""Frozen vision foundation models (VFMs): one adapter for every row of the table in `vfms.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.backbones import (
    EfficientNetTokens,
    RandomViT,
    TokenMerger,
    build_tower,
    drop_norm_affine,
    load_pretrained,
)
from openpae.models.layers import to_grid, to_tokens
from openpae.models.vfms import EncoderSpec, encoder_spec
from openpae.storage.files import fingerprint
from openpae.storage.weights import load_strict


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
        FileNotFoundError: the weights cannot be had.
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
        architecture: what `encoder_architecture` gives, read; None takes the row's published sizes.
        trainable: let it be finetuned.

    Raises:
        ValueError: an unknown name.
    """
    spec = encoder_spec(name)
    sizes = architecture or {**spec.architecture, **spec.options}
    backbone = _backbone(spec, lambda: build_tower(spec.model_class, sizes), pretrained=False)
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
