"""Two discriminators and their augmentation.

The output of a discriminator depends on its weights and its input alone. It has no batch statistics, and a
forward pass changes no state. A step may run it several times, and k device batches give the gradients of one
batch of k times the size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.configs import DiscriminatorConfig
from openpae.models.layers import to_grid
from openpae.models.vfms import IMAGENET_MEAN, IMAGENET_STD
from openpae.runtime.extras import needs

AUGMENT_DRAWS = 7
"""Uniform numbers per image that `diff_augment` needs."""


class SpectralConv2d(nn.Module):
    """Convolution with spectral norm: the kernel is divided by its largest singular value (arXiv:1802.05957).

        W / sigma(W),   sigma(W) = u^T W v,   W as a matrix (out, in k k)

    u and v come from power iteration. Common implementations run one iteration per training pass and keep u,
    so the network depends on the number of passes. Here each pass runs 16 iterations from the same fixed
    vector: sigma depends on the weights alone, and there is no state to save. On random kernels of the sizes
    used here sigma is at most 4 % too small, and less where one direction dominates. The gradient treats u
    and v as constants.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side of the kernel.
        stride: pixels between two windows.
        padding: zeros around the input.
    """

    start: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        start = torch.randn(outputs, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("start", F.normalize(start, dim=0), persistent=False)
        # All singular values 1: sigma starts exact, and features keep their scale through the depth.
        nn.init.orthogonal_(self.weight)
        self.kept: list[tuple[Tensor, Tensor]] | None = None
        """Inside `norms_once`: the vectors u and v, after the first pass."""

    def sigma(self) -> Tensor:
        """The largest singular value of the kernel as a matrix: scalar, float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            u, v = self.kept[0] if self.kept else self._singular_vectors(matrix.detach())
            sigma: Tensor = u @ (matrix @ v)
            return sigma

    def _singular_vectors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        u = self.start
        for _ in range(16):
            v = F.normalize(matrix.mT @ u, dim=0)
            u = F.normalize(matrix @ v, dim=0)
        if self.kept is not None:
            self.kept.append((u, v))
        return u, v

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, H, W). Returns (B, outputs, H', W')."""
        return F.conv2d(x, self.weight / self.sigma(), self.bias, self.stride, self.padding)


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv:1611.07004): one logit for each overlapping patch. Spectral norm is its only norm.

    Batch norm would couple the images of a device batch, and instance norm would remove their contrast.

    Args:
        width: channels of the first layer.
        num_layers: layers of stride 2.
    """

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [3, *(width * min(2**layer, 8) for layer in range(num_layers + 1))]
        strides = [2] * num_layers + [1]
        self.layers = nn.ModuleList(
            SpectralConv2d(inputs, outputs, 4, stride, padding=1)
            for inputs, outputs, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.to_logits = SpectralConv2d(widths[-1], 1, 4, padding=1)
        self.smallest = 3 * 2**num_layers

    def features(self, images: Tensor) -> list[Tensor]:
        """An input of `forward`: the images themselves, as no layer is frozen."""
        return [images]

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Logits of images; higher means more likely real.

        Args:
            images: (B, 3, H, W) in [0, 1]; decodes may leave the range. Gradients flow to these.

        Returns:
            (B, h', w'), one logit per patch: 30 x 30 for 256 pixels and 3 layers, 6 x 6 for 64.

        Raises:
            ValueError: not (B, 3, H, W), or too small for one patch.
        """
        images = images if isinstance(images, Tensor) else images[0]
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"images must be (B, 3, H, W) with H and W >= {self.smallest} for {len(self.layers) - 1} "
                f"layers of stride 2, got {tuple(images.shape)}"
            )
        x = 2 * images - 1
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        logits: Tensor = self.to_logits(x)
        return logits[:, 0]


class FeatureDiscriminator(nn.Module):
    """Small trained heads on several layers of a frozen ViT (after StyleGAN-T, arXiv:2301.09515).

    Args:
        backbone: a ViTModel of the transformers package. It is frozen and stays in evaluation mode. Gradients
            pass through it to the images.
        taps: its blocks, counted from 1, whose outputs the heads read.
        head_dim: width of the heads.

    Raises:
        ValueError: the backbone has fewer blocks than the largest tap.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, taps: Sequence[int] = (3, 6, 9, 12), head_dim: int = 256) -> None:
        super().__init__()
        facts: Any = backbone.config
        if max(taps) > facts.num_hidden_layers:
            raise ValueError(
                f"taps must lie in [1, {facts.num_hidden_layers}], the blocks of this ViT, got {tuple(taps)}"
            )
        self.taps = tuple(taps)
        self.image_size, self.patch_size = int(facts.image_size), int(facts.patch_size)
        self.backbone = backbone.eval().requires_grad_(False)
        self.heads = nn.ModuleList(FeatureHead(facts.hidden_size, head_dim) for _ in taps)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the heads; the backbone always stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of the frozen ViT: (B, D, h, w) at each tap. They do not depend on the heads.

        Args:
            images: (B, 3, H, W) in [0, 1]; decodes may leave the range. Resized (bilinear, antialiased) to
                the image size of the ViT, so that its positions fit. Gradients flow to these.

        Raises:
            ValueError: not (B, 3, H, W).
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        states = self.backbone((images - self.mean) / self.std, output_hidden_states=True).hidden_states
        side = self.image_size // self.patch_size
        return [to_grid(states[tap][:, 1:], side, side) for tap in self.taps]  # without the CLS token

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Logits of images; higher means more likely real.

        Args:
            images: see `features`; or the output of `features`.

        Returns:
            (B, taps, N): one logit per token and tap; 4 x 784 for DINO-S/8.
        """
        grids = self.features(images) if isinstance(images, Tensor) else images
        return torch.stack([head(grid) for grid, head in zip(grids, self.heads, strict=True)], dim=1)


class FeatureHead(nn.Module):
    """Three convolutions with spectral norm (1x1, 3x3, 1x1) on tokens, each normalised over its channels."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.mix = SpectralConv2d(dim, width, 1)
        self.look = SpectralConv2d(width, width, 3, padding=1)
        self.to_logits = SpectralConv2d(width, 1, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """grid: features of one layer, (B, D, h, w). Returns logits: (B, h w)."""
        # Deeper layers of a ViT have larger features. The norm gives all heads one scale.
        x = F.layer_norm(grid.movedim(1, -1), grid.shape[1:2]).movedim(-1, 1)
        x = F.leaky_relu(self.mix(x), 0.2)
        x = F.leaky_relu(self.look(x), 0.2)
        logits: Tensor = self.to_logits(x)
        return logits.flatten(1)


def build_discriminator(config: DiscriminatorConfig) -> PatchDiscriminator | FeatureDiscriminator:
    """A new discriminator; kind "features" has the pretrained ViT that the config names.

    Raises:
        FileNotFoundError: the weights cannot be loaded.
        ValueError: they do not fit a ViTModel, or have fewer blocks than the largest tap.
    """
    if config.kind == "patch":
        return PatchDiscriminator(config.width, config.num_layers)
    with needs("vfm", "a discriminator on DINO"):
        import transformers  # half a second and 100 MB that only this kind needs

    vit: Any = transformers.ViTModel
    try:
        backbone, report = vit.from_pretrained(
            config.source, add_pooling_layer=False, output_loading_info=True
        )
    except OSError as error:
        raise FileNotFoundError(
            f"no weights of ViTModel at {config.source!r}; give discriminator.source a local folder or a hub "
            f"name that can be reached, or take discriminator.kind patch ({str(error).splitlines()[0]})"
        ) from None
    if faults := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(f"weights at {config.source!r} do not fit ViTModel: {', '.join(faults[:5])}")
    return FeatureDiscriminator(backbone, config.taps, config.head_dim)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module collect no gradients, but gradients reach its input.

    For the adversarial loss of the autoencoder: otherwise the discriminator would step along that gradient
    too. A graph built inside can run backward after the block.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def norms_once(module: nn.Module | None) -> Iterator[None]:
    """Inside, the power iteration of each spectral norm runs once for all passes.

    The weights must not change inside. A cache on the version counter of the weights would be wrong, because
    a fused optimizer does not raise it.
    """
    convs = [part for part in module.modules() if isinstance(part, SpectralConv2d)] if module else []
    for conv in convs:
        conv.kept = []
    try:
        yield
    finally:
        for conv in convs:
            conv.kept = None


def diff_augment(images: Tensor, draws: Tensor) -> Tensor:
    """Augment the input of a discriminator differentiably (DiffAugment, arXiv:2006.10738).

    Per image, in this order: brightness +- 0.25, saturation times [0, 2), contrast times [0.5, 1.5), a shift
    by up to an eighth of the side, and a hole of a fifth of the sides. Shift and hole uncover mid-grey. The
    numbers are DiffAugment's, on [0, 1] instead of [-1, 1]. The hole is an exception: half of the side there,
    a fifth in public recipes with a DINO discriminator.

    Args:
        images: (B, 3, H, W) in [0, 1]. Gradients flow to these.
        draws: uniform in [0, 1), (B, AUGMENT_DRAWS), constant; the same for real and fake images.

    Returns:
        (B, 3, H, W); may leave [0, 1].

    Raises:
        ValueError: images or draws have another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3 or draws.shape != (len(images), AUGMENT_DRAWS):
        raise ValueError(
            f"images must be (B, 3, H, W) and draws (B, {AUGMENT_DRAWS}), got {tuple(images.shape)} and "
            f"{tuple(draws.shape)}"
        )
    brightness, saturation, contrast = draws[:, :3, None, None, None].unbind(1)
    x = images.float() - 0.5 + (brightness - 0.5) / 2
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (contrast + 0.5)
    x = _shift(_shift(x, 2, draws[:, 3]), 3, draws[:, 4])
    inside = _in_hole(x.shape[2], draws[:, 5])[:, :, None] & _in_hole(x.shape[3], draws[:, 6])[:, None]
    return x.masked_fill(inside[:, None], 0) + 0.5


def _shift(x: Tensor, dim: int, draw: Tensor) -> Tensor:
    """Shift images (B, 3, H, W) along an axis by an integer number of pixels each, and fill with zeros."""
    size = x.shape[dim]
    most = round(size / 8)
    by = (draw * (2 * most + 1)).long() - most  # (B,)
    source = torch.arange(size, device=x.device) - by[:, None]  # (B, size)
    index = source.clamp(0, size - 1).view(-1, 1, *((size, 1) if dim == 2 else (1, size))).expand_as(x)
    outside = ((source < 0) | (source >= size)).view(-1, 1, *((size, 1) if dim == 2 else (1, size)))
    return x.gather(dim, index).masked_fill(outside, 0)


def _in_hole(size: int, draw: Tensor) -> Tensor:
    """Mask of the pixels of an axis inside the hole, (B, size); its centre may be any pixel."""
    hole = round(size / 5)
    first = (draw * size).long() - hole // 2
    offset = torch.arange(size, device=draw.device) - first[:, None]
    return (offset >= 0) & (offset < hole)
