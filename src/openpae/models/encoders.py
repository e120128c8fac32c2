"""Frozen vision foundation models (VFMs): one adapter for every row of the table in `vfms.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
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
    last_blocks,
    load_pretrained,
    outputs_of,
)
from openpae.models.layers import to_grid, to_tokens
from openpae.models.vfms import EncoderSpec, encoder_spec
from openpae.storage.files import fingerprint
from openpae.storage.weights import load_strict


class Encoder(Protocol):
    """The interface of a VFM; `PAE` accepts every nn.Module with these two."""

    @property
    def spec(self) -> EncoderSpec:
        """The facts of this encoder."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (B, N, D) of pixels (B, 3, h stride, w stride), normalised by mean and std of the spec."""
        ...


class FrozenEncoder(nn.Module):
    """A VFM that gives patch tokens; frozen by default.

    Args:
        spec: its row of the table.
        backbone: maps normalised pixels to tokens (B, P + N, D), P prefix tokens first, or to an output
            of the transformers package with them as `last_hidden_state`.
        trainable: let gradients flow, for the finetuned VFM of Table 3(b).
    """

    def __init__(self, spec: EncoderSpec, backbone: nn.Module, *, trainable: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.trainable = trainable
        self.backbone = backbone
        self.last_blocks = last_blocks(backbone, spec.layers) if spec.family != "efficientnet-lite0" else ()
        self.merger = TokenMerger(spec.dim, spec.dim, spec.merge) if spec.merge_by == "mlp" else None
        self.eval().requires_grad_(trainable)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: dropout stays off while the tokenizer trains."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: normalised, (B, 3, h stride, w stride). Returns features: (B, N, D), N = h w.

        Raises:
            ValueError: the number of tokens does not match the spec.
        """
        spec = self.spec
        h, w = (side * spec.merge // spec.stride for side in pixels.shape[-2:])
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            tokens = self._tokens(pixels, self._options(h * w, pixels))
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

    def _tokens(self, pixels: Tensor, options: dict[str, Any]) -> Tensor:
        """All tokens after the last norm, if there is one, (B, P + N, D): of the last layer, or of a sum."""
        with outputs_of(self.last_blocks) as kept:
            output = self.backbone(pixels, **options)
        if not self.last_blocks:
            return output if isinstance(output, Tensor) else output.last_hidden_state
        total = torch.stack(kept).sum(dim=0)
        if self.spec.final_norm is None:
            return total
        normed: Tensor = self.backbone.get_submodule(self.spec.final_norm)(total)
        return normed

    def _options(self, count: int, pixels: Tensor) -> dict[str, Any]:
        """Arguments of the backbone beside the pixels."""
        options: dict[str, Any] = {}
        if self.spec.asks_to_interpolate:
            options["interpolate_pos_encoding"] = True
        if self.spec.shuffles:  # tokens are sorted by this noise; ascending noise keeps their order
            options["noise"] = torch.arange(count, device=pixels.device).expand(pixels.shape[0], -1)
        return options


class EncoderInput(nn.Module):
    """Prepare images for a VFM: resize them so that each patch of the decoder is one token, and normalise.

    Args:
        spec: row of the VFM.
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
        source: hub name or local folder of the weights; None: the repository of the row.
        trainable: let it be finetuned.
        state: the weights under the names of a FrozenEncoder, if they are already loaded. The source then
            gives only the architecture, and may be a file with the output of `encoder_architecture`. After
            "backbone." stand names of the hub's file, of the class or of its earlier versions; those of the
            last norm may be missing.

    Raises:
        ValueError: an unknown name, a source for a row that takes none, or weights that do not fit.
        FileNotFoundError: the weights cannot be loaded.
    """
    spec = encoder_spec(name)
    if source is not None and spec.family != "transformers":
        raise ValueError(f"encoder {name!r} takes its weights from a package, so encoder_source must be null")
    if spec.merge_by == "mlp" and state is None:
        raise ValueError(
            f"encoder {name!r} has an MLP whose weights only a released tokenizer holds; import one with pae "
            "import-official, or train with internvit-300m"
        )
    given = state or {}
    inner = {key.removeprefix("backbone."): v for key, v in given.items() if key.startswith("backbone.")}
    outer = {key: value for key, value in given.items() if not key.startswith("backbone.")}
    tower = partial(_pretrained, spec, source or spec.repo, None if state is None else inner)
    backbone = _backbone(spec, tower, state is None)
    if state is not None and spec.family != "transformers":
        load_strict(backbone, inner, f"weights of the encoder {name!r}")
    encoder = FrozenEncoder(spec, backbone, trainable=trainable)
    if state is not None:
        own = {f"backbone.{key}": value for key, value in encoder.backbone.state_dict().items()}
        load_strict(encoder, own | outer, f"weights of the encoder {name!r}")
    return encoder


def empty_encoder(
    name: str, architecture: Mapping[str, Any] | None = None, *, trainable: bool = False
) -> FrozenEncoder:
    """A VFM of the table without its weights: nothing is downloaded.

    Args:
        name: a row of `ENCODERS`.
        architecture: the output of `encoder_architecture`; None: the published sizes of the row.
        trainable: let it be finetuned.

    Raises:
        ValueError: an unknown name.
    """
    spec = encoder_spec(name)
    sizes = architecture or {**spec.architecture, **spec.options}
    backbone = _backbone(spec, lambda: build_tower(spec.model_class, sizes), pretrained=False)
    return FrozenEncoder(spec, backbone, trainable=trainable)


def encoder_fingerprint(encoder: Encoder) -> str:
    """Fingerprint of an encoder: its weights, and the facts of its spec about input and output.

    It does not depend on the names of the weights, which the transformers package has changed more than once.

    Raises:
        TypeError: the encoder is not an nn.Module, so it has no weights.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be an nn.Module, got {type(encoder).__name__}")
    spec = encoder.spec
    facts: tuple[object, ...] = (spec.stride, spec.num_prefix_tokens, spec.image_mean, spec.image_std)
    if spec.layers > 1:
        facts += (spec.layers,)
    return fingerprint({}, repr(facts), *sorted(fingerprint({"": w}) for w in encoder.state_dict().values()))


def encoder_architecture(encoder: Encoder | None) -> dict[str, Any] | None:
    """The config with which the transformers package builds an encoder, as plain data; None for other
    encoders."""
    if not isinstance(encoder, FrozenEncoder) or encoder.spec.family != "transformers":
        return None
    config: Any = encoder.backbone.config
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    del plain["_name_or_path"]  # the path on this machine
    return plain


def _backbone(spec: EncoderSpec, tower: Callable[[], nn.Module], pretrained: bool) -> nn.Module:
    if spec.family == "efficientnet-lite0":
        return EfficientNetTokens(pretrained=pretrained, layers=spec.layers)
    if spec.family == "random":
        return RandomViT(spec.dim, spec.stride, spec.num_heads)
    built = tower()
    if spec.final_norm is not None:
        drop_norm_affine(built, spec.final_norm)
    return built


def _pretrained(spec: EncoderSpec, source: str, state: Mapping[str, Tensor] | None) -> nn.Module:
    if state is not None and spec.final_norm is not None:  # its scale and shift are dropped below
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
        "number of heads": (model.config.num_attention_heads, spec.num_heads),
        "patch": (patch if isinstance(patch, int) else patch[0], spec.stride // spec.merge),
    }
    for fact, (actual, expected) in facts.items():
        if actual != expected:
            raise ValueError(
                f"weights at {source!r} are of {fact} {actual}, but the encoder's row says {expected}; "
                "name the row of their size"
            )
    tower: nn.Module = model
    return tower
