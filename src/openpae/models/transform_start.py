"""Initial weights with which a tokenizer begins as a cosine transform of its patches (our choice).

A run of minutes then starts from pictures, where random weights start from grey (docs/results.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from openpae.models.layers import start_at_self
from openpae.models.modulator import DetailModulator
from openpae.models.tokenizer import PAE, Autoencoder

_GAIN, _ANCHOR, _REST = 8.0, 4.0, 0.3
"""Weight of the detail against the VFM's features, value of the channel that keeps the contrast over the
sphere's norm, and scale of the residual branches; tried in docs/log.md."""


@torch.no_grad()
def start_as_transform(model: PAE) -> None:
    """Let C - 1 latent channels start as the lowest DCT-II coefficients of each patch, the last as constant.

    Grey patterns count at their frequency, colours as if at 2.2 times theirs. The constant lets the contrast
    survive the sphere's norm. The residual branches start small and spare the channels of the coefficients.
    The last layer stays as it is: see `fit_readout`.

    Raises:
        ValueError: the tokenizer has no modulator of kind modulate, or is narrower than its latent.
    """
    modulator, decoder, count = model.modulator, model.decoder, model.config.latent_dim - 1
    if not isinstance(modulator, DetailModulator) or model.config.fusion != "modulate":
        raise ValueError(f"start dct needs model.fusion modulate, got {model.config.fusion}")
    dim, width = modulator.patch_embed.out_channels, decoder.to_pixels.in_features
    if count > min(dim, width):
        raise ValueError(f"start dct needs a width of at least {count}, got {dim} and {width} in the decoder")
    enter, leave = _steady(modulator.positions[0], count), _steady(decoder.positions[0], count)
    patterns, scale = _patterns(model.config.decoder.patch_size, modulator.patch_embed.kernel_size[0], count)
    modulator.patch_embed.weight[enter] = patterns.permute(0, 3, 1, 2) * (0.5 * scale[:, None, None, None])
    assert modulator.patch_embed.bias is not None
    modulator.patch_embed.bias[enter] = -modulator.positions[0][:, enter].mean(dim=0)
    for layer in modulator.layers:
        _spare(layer, enter)
    if isinstance(model.narrow, nn.Linear):
        model.narrow.weight[enter] = 0
        model.narrow.bias[enter] = 0
    modulator.fusion.proj.weight[dim + enter, enter] = _GAIN
    for projector in (model.projector, model.deprojector):
        start_at_self(projector.attn, gain=4.0)
        projector.attn.qkv.weight[2 * dim :] = torch.eye(dim)
        projector.attn.proj.weight.copy_(torch.eye(dim))
    channels = torch.arange(count)
    to_latent, from_latent = model.projector.to_latent, model.deprojector.from_latent
    to_latent.weight.mul_(0.1)
    to_latent.weight[:count] = 0
    to_latent.weight[channels, enter, 1, 1] = 1
    to_latent.weight[count] = 0
    assert to_latent.bias is not None
    to_latent.bias[count] = _ANCHOR
    from_latent.weight.mul_(0.1)
    from_latent.weight[enter] = 0
    from_latent.weight[enter, channels, 1, 1] = 1
    decoder.embed.weight.zero_()
    decoder.embed.weight[leave, enter] = 1
    decoder.embed.bias[leave] = -decoder.positions[0][:, leave].mean(dim=0)
    for block in decoder.blocks:
        _spare(block, leave)


@torch.no_grad()
def fit_readout(model: Autoencoder, images: Tensor, features: Tensor) -> None:
    """Set the decoder's last layer to the least-squares fit of what it is given to the pixels of some images.

    Args:
        model: with any initial weights.
        images: in [0, 1], (B, 3, H, W).
        features: theirs, (B, N, D).
    """
    seen: list[Tensor] = []
    to_pixels, patch = model.decoder.to_pixels, model.config.decoder.patch_size
    hook = to_pixels.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.decode(model.encode(images, features))
    hook.remove()
    pixels = (images - model.encoder_input.mean) / model.encoder_input.std
    b, c, h, w = pixels.shape
    cells = pixels.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    target = cells.reshape(-1, c * patch * patch).double()
    given = seen[0].reshape(len(target), -1).double()
    given = torch.cat([given, given.new_ones(len(given), 1)], dim=1)
    normal = given.T @ given
    ridge = 1e-4 * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    weights = torch.linalg.solve(normal + ridge, given.T @ target)
    to_pixels.weight.copy_(weights[:-1].T)
    to_pixels.bias.copy_(weights[-1])


def _steady(positions: Tensor, count: int) -> Tensor:
    """The channels in which the positions (N, D) change least."""
    return positions.std(dim=0).argsort(stable=True)[:count]


def _spare(block: nn.Module, channels: Tensor) -> None:
    """Let a block's residual branches start small, and leave some channels as they are."""
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in ("proj", "fc2"):
            layer.weight.mul_(_REST)
            layer.weight[channels] = 0


def _patterns(patch: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """The lowest `count` patterns of a patch, drawn at `size` pixels: (count, size, size, 3), and scales.

    The patterns give the coefficients of the patch, whatever it was enlarged to; the scale evens them out.
    """
    waves = torch.arange(patch).float().outer((torch.arange(size) + 0.5) * (patch / size)) * (math.pi / patch)
    norms = torch.full((patch,), (patch / 2) ** 0.5)
    norms[0] = patch**0.5
    waves = waves.cos() / norms[:, None] * (patch / size)
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    patterns = torch.einsum("uy,vx,kc->uvkyxc", waves, waves, colours).flatten(0, 2)
    number = torch.arange(patch).float()
    frequency = torch.hypot(number[:, None], number).clamp_min(0.5)[..., None] * torch.tensor([1.0, 2.2, 2.2])
    order = frequency.flatten().argsort(stable=True)[:count]
    scale = (frequency.flatten()[order] / patch).sqrt()
    return patterns[order], scale / scale.mean()
