"""The sizes of every model, as frozen configs. This file imports no torch, so the help starts at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from openpae.config import added, check_fields

COUNT, WIDTH, LAYERS = "[1, 16777216]", "[1, 65536]", "[1, 1024]"
"""Allowed intervals of sizes. A value beyond is a mistake, and the model would be built for hours."""


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless the heads divide the width."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the width, got {num_heads} heads for a width of {dim}")


LPIPSNet = Literal["vgg", "alex"]


PerceptualNet = Literal["vgg", "alex", "random"]
"""What a run may ask for: LPIPS as published, or fixed random weights for trials."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """A discriminator."""

    kind: Literal["features", "patch"] = "features"
    """features: heads on a frozen ViT, as in the nearest public recipe (RAE, arXiv:2510.11690); patch: a
    PatchGAN, which needs no weights."""
    source: str = "facebook/dino-vits8"
    """features: hub name or local folder of the ViT, a ViTModel of the transformers package."""
    taps: tuple[int, ...] = (3, 6, 9, 12)
    """features: blocks of the ViT, counted from 1, whose outputs the heads read."""
    head_dim: int = 256
    """features: width of the heads."""
    width: int = 64
    """patch: channels of the first layer; each further layer doubles them, up to 8 times."""
    num_layers: int = 3
    """patch: layers of stride 2; with 3, each logit depends on 70 x 70 pixels."""

    def __post_init__(self) -> None:
        check_fields(self, "discriminator.", head_dim=WIDTH, width=WIDTH, num_layers=LAYERS)
        if not self.taps or list(self.taps) != sorted({tap for tap in self.taps if tap >= 1}):
            raise ValueError(
                f"discriminator.taps must hold blocks of the ViT, counted from 1, in order, got {self.taps}"
            )


@dataclass(frozen=True, kw_only=True)
class LowPassConfig:
    """The low-pass between upsampling and the latent grid.

    Our choice: the paper says "low-pass" and "spatial normalisation, strength 0.4" (docs/deviations.md).
    """

    kind: Literal["blend", "subtract", "spatial-norm"] = added("blend")
    """blend: (1 - s) H + s blur(H). subtract: H - s blur(H), a high-pass. spatial-norm: (H - s mean) / std,
    both over the places of an image, as in iREPA (arXiv:2512.10794); it acts as a high-pass too."""
    strength: float = 0.4
    """Strength s; with 0, blend and subtract change nothing."""
    sigma: float = 0.5
    """Standard deviation of the Gaussian, in cells of the latent grid. Half a cell leaves 29 % of the
    amplitude at the Nyquist frequency of the grid, and 0.7 % at twice that, which sampling would alias to a
    constant."""

    def __post_init__(self) -> None:
        check_fields(self, "low_pass.", strength="[0, 1]", sigma="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """A refiner. The defaults are for DINOv2-L; the decoder's sizes are the paper's."""

    feature_dim: int = 1024
    """Width D of the VFM's features."""
    latent_dim: int = 32
    """Channels C of the targets: those of the tokenizer's latent."""
    grid_size: int = 16
    """Side of the token grid, or its height h where grid_width is set: that of the tokenizer's latent."""
    grid_width: int | None = None
    """Width w of the token grid where it is not square; null: as grid_size."""
    num_heads: int = 16
    """Attention heads of P_t: those of the VFM."""
    decoder_layers: int = 4
    """Transformer blocks of Q_t."""
    decoder_dim: int = 1024
    """Width of Q_t."""
    decoder_heads: int = 16
    """Attention heads of Q_t."""

    def __post_init__(self) -> None:
        sizes = ("feature_dim", "latent_dim", "grid_size", "grid_width", "decoder_dim")
        check_fields(self, decoder_layers=LAYERS, **dict.fromkeys(sizes, WIDTH))
        for name, width in (("num_heads", self.feature_dim), ("decoder_heads", self.decoder_dim)):
            if (heads := getattr(self, name)) < 1 or width % heads:
                raise ValueError(f"{name} must divide the width {width}, got {heads}")
        if self.decoder_dim % 4:
            raise ValueError(f"decoder_dim must be a multiple of 4 for its positions, got {self.decoder_dim}")

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(h, w)."""
        return (self.grid_size, self.grid_width or self.grid_size)


@dataclass(frozen=True, kw_only=True)
class LinearTargetsConfig:
    """A fixed linear map of the features: the raw targets of Table 2(b)."""

    projection: Literal["pca", "random"] = "pca"
    """How the map was computed."""
    feature_dim: int = 1024
    """Width D of the VFM's features."""
    latent_dim: int = 32
    """Channels C of the targets."""

    def __post_init__(self) -> None:
        check_fields(self, feature_dim=WIDTH, latent_dim=f"[1, {self.feature_dim}]")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The pixel decoder, a ViT. The paper's sizes: B 768/12/12/3072, L 1024/24/16/4096, XL
    1152/28/16/4096."""

    hidden_dim: int = 1024
    """Width W."""
    num_layers: int = 24
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads."""
    mlp_dim: int = 4096
    """Width inside the MLPs."""
    patch_size: int = 16
    """Pixels per token and axis: image_size / patch_size is the side of the latent grid."""

    def __post_init__(self) -> None:
        sizes = ("hidden_dim", "num_heads", "mlp_dim", "patch_size")
        check_fields(self, "decoder.", num_layers=LAYERS, **dict.fromkeys(sizes, WIDTH))
        check_heads(self.hidden_dim, self.num_heads)


@dataclass(frozen=True, kw_only=True)
class PAEConfig:
    """A tokenizer. The defaults are the paper's main model: DINOv2-L, 32 channels on 16x16."""

    encoder: str = "dinov2-l"
    """The VFM, a row of openpae.models.vfms.ENCODERS. NAME+K sums its last K layers, as in RAEv2."""
    encoder_source: str | None = None
    """Hub name or local folder of its weights; null: the repository of the row."""
    image_size: int = 256
    """Side of the training images in pixels, or their height where image_width is set. A trained tokenizer
    accepts images of every size that its patches divide."""
    image_width: int | None = None
    """Width of the training images where they are not square; null: as image_size."""
    latent_dim: int = 32
    """Latent channels C."""
    modulator_layers: int = 6
    """Layers K of the Detail-Aware Modulator."""
    width: int | None = None
    """Width of modulator and projectors; null: the width of the VFM, as in the paper. Otherwise a linear
    layer after the VFM narrows its features (our choice, for sizes that a CPU can train)."""
    fusion: Literal["modulate", "add", "concat", "finetune", "none"] = "modulate"
    """How detail changes the VFM's features (Table 3b). finetune has no modulator and trains the VFM. none is
    RAE (arXiv:2510.11690): the features are the latent, and only the decoder is trained."""
    sphere: Literal["token", "sample"] = "token"
    """Values over which the sphere norm takes the mean square: the channels of a token (paper), or all values
    of a sample."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The pixel decoder."""

    def __post_init__(self) -> None:
        sizes = ("image_size", "image_width", "latent_dim", "width")
        check_fields(self, modulator_layers="[0, 1024]", **dict.fromkeys(sizes, WIDTH))
        for name, side in zip(("image_size", "image_width"), self.image_shape, strict=True):
            if side % self.decoder.patch_size:
                raise ValueError(
                    f"{name} must be a multiple of decoder.patch_size, "
                    f"got {side} and {self.decoder.patch_size}"
                )
        if self.fusion == "none" and self.width is not None:
            raise ValueError(
                f"fusion none keeps the VFM's features unchanged, so width must be null, got {self.width}"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) of the training images."""
        return (self.image_size, self.image_size if self.image_width is None else self.image_width)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(h, w) of their latents."""
        height, width = self.image_shape
        return (height // self.decoder.patch_size, width // self.decoder.patch_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return (self.latent_dim, *self.grid_shape)


SIZES = {
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
    "1p0b": (24, 1536, 24),
    "1p6b": (28, 1792, 28),
}
"""num_layers, hidden_dim, num_heads of the named sizes."""


def size_fields(size: str) -> dict[str, Any]:
    """num_layers, hidden_dim and num_heads of a named size.

    Raises:
        ValueError: no such size.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    return dict(zip(("num_layers", "hidden_dim", "num_heads"), SIZES[size], strict=True))


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The wide head of a DiT-DH. The defaults are RAE's, for every size of the DiT."""

    hidden_dim: int = 2048
    """Width W; at least the latent channels of a patch (Theorem 1 of RAE)."""
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads."""

    def __post_init__(self) -> None:
        check_fields(self, "head.", hidden_dim=WIDTH, num_layers=LAYERS)
        check_heads(self.hidden_dim, self.num_heads)


@dataclass(frozen=True, kw_only=True)
class _DiTSizes:
    """The sizes that every generator has; the fields of a generator follow in this order."""

    latent_dim: int = 32
    """Latent channels C."""
    grid_size: int = 16
    """Side of the latent grid, or its height h where grid_width is set."""
    grid_width: int | None = None
    """Width w of the latent grid where it is not square; null: as grid_size."""
    patch_size: int = 1
    """Latent cells per token and axis."""
    hidden_dim: int = 1152
    """Width D of the DiT."""
    num_layers: int = 28
    """Transformer blocks of the DiT."""
    num_heads: int = 16
    """Attention heads of the DiT."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("latent_dim", "grid_size", "grid_width", "patch_size", "hidden_dim"), WIDTH)
        check_fields(self, num_layers=LAYERS, num_classes=COUNT, class_dropout="[0, 1]", **sizes)
        for name in ("grid_size", "grid_width"):
            if (side := getattr(self, name) or 0) % self.patch_size:
                raise ValueError(f"patch_size must divide {name}, got {self.patch_size} and {side}")
        check_heads(self.hidden_dim, self.num_heads)

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> Self:
        """A config of a named size of the DiT: s, b, l, xl, 1p0b or 1p6b. RAE uses s, b, l and xl.

        Raises:
            ValueError: no such size.
        """
        return cls(**size_fields(size), **changes)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return (self.latent_dim, self.grid_size, self.grid_width or self.grid_size)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        _, h, w = self.latent_shape
        return (h // self.patch_size, w // self.patch_size)

    @property
    def num_blocks(self) -> int:
        """Blocks that `layers.run_blocks` can checkpoint."""
        return self.num_layers


@dataclass(frozen=True, kw_only=True)
class _HeadedSizes(_DiTSizes):
    latent_dim: int = 768
    """Latent channels C."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The wide head behind the DiT."""

    @property
    def num_blocks(self) -> int:
        """Blocks that `layers.run_blocks` can checkpoint: those of the DiT and of the head."""
        return self.num_layers + self.head.num_layers


@dataclass(frozen=True, kw_only=True)
class _ClassFields:
    num_classes: int = 1000
    """Classes K; label K is the null class of classifier-free guidance."""
    class_dropout: float = 0.1
    """How often training replaces a label by the null class, in [0, 1]."""
    qk_norm: bool = False
    """RMS-normalise queries and keys: off in PAE's 80-epoch recipe and in RAE, on in PAE's 800-epoch
    recipe."""


@dataclass(frozen=True, kw_only=True)
class LightningDiTConfig(_ClassFields, _DiTSizes):
    """A generator. The defaults are XL/1 on 32x16x16 latents with the 1,000 classes of ImageNet."""


@dataclass(frozen=True, kw_only=True)
class DiTDHConfig(_ClassFields, _HeadedSizes):
    """A generator with a wide head. The defaults are RAE's DiT-DH-XL on features of DINOv2-B."""


GeneratorConfig = LightningDiTConfig | DiTDHConfig
"""The config of either generator."""
