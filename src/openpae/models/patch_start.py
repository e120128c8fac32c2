"""A start for short runs of the tokenizer: the best linear code of patches that its layers can express."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.layers import SelfAttention, TransformerBlock, start_at_self
from openpae.models.modulator import DetailModulator, ModulatorLayer
from openpae.models.tokenizer import PAE, Autoencoder

_GAIN = 3.0
"""Of the components beside the positions that are added to them, whose root mean square is 0.7."""


@torch.no_grad()
def start_from_patches(model: Autoencoder, images: Tensor, features: Tensor | None = None) -> None:
    """Initial weights with which the tokenizer passes the principal components of patches.

        d = V (p - mean p),  z = sphere([d, c]),  x_r = W decoder(z) + b

    V holds the C - 1 principal directions of the patches p of some images, scaled by the fourth root of the
    inverse variance, so that weak ones survive the sphere. They replace as many channels of the features; the
    others stay. A constant c, as long as a usual d, keeps the length of d, which the sphere norm would lose.
    The residual branches of modulator and decoder start at 0, both attentions at each token itself
    (`start_at_self`). The readout W, b is the least-squares fit to the pixels. Random weights need thousands
    of steps to get as far (docs/log.md).

    Args:
        model: a tokenizer with fusion "modulate" whose width is at least its number of latent channels.
        images: in [0, 1], (B, 3, H, W), of the size of training; some thousand patches in all are enough.
        features: of these images, (B, N, D), where they are cached.

    Raises:
        ValueError: another fusion, or too narrow a model.
    """
    channels = model.config.latent_dim
    if not isinstance(model, PAE) or model.config.fusion != "modulate":
        raise ValueError(
            f"start patches needs model.fusion modulate, got {model.config.fusion}; use another start"
        )
    modulator, projector, deprojector = model.modulator, model.projector, model.deprojector
    assert isinstance(modulator, DetailModulator)  # for the type checker: the fusion says so
    width = modulator.patch_embed.out_channels
    if width < channels:
        raise ValueError(f"start patches needs a width >= latent_dim = {channels}, got {width}")
    _embed_components(modulator.patch_embed, model.preprocess(images), channels - 1)
    _silence_branches(model)
    # u (1 + gamma) + beta: gamma = -1 where components come, beta = d.
    fusion = modulator.fusion.proj
    nn.init.zeros_(fusion.weight)
    nn.init.zeros_(fusion.bias)
    fusion.bias[: channels - 1] = -1
    fusion.weight[width:] = torch.eye(width) / _GAIN

    for attention in (projector.attn, deprojector.attn):
        _pass_tokens(attention)
    to_latent, from_latent = projector.to_latent, deprojector.from_latent
    nn.init.zeros_(to_latent.weight)
    places = torch.arange(channels - 1)
    to_latent.weight[places, places, 1, 1] = 1
    seen = _output_of(to_latent, lambda: model.encode(images, features))[:, :-1]
    assert to_latent.bias is not None  # for the type checker
    to_latent.bias[-1] = seen.square().sum(dim=1).mean().sqrt()
    nn.init.zeros_(from_latent.weight)
    isometry = nn.init.orthogonal_(torch.empty(width, channels))
    from_latent.weight[..., 1, 1] = isometry * (width / channels) ** 0.5
    nn.init.orthogonal_(model.decoder.embed.weight)
    z = model.encode(images, features)
    tokens = _output_of(model.decoder.norm, lambda: model.decode(z))[:, 1:]
    pixels = (images - model.encoder_input.mean) / model.encoder_input.std
    _fit(model.decoder.to_pixels, tokens.flatten(0, 1), _patches(pixels, model.decoder.patch_size))


def _embed_components(embed: nn.Conv2d, pixels: Tensor, count: int) -> None:
    """Let the first channels be the principal components of patches, times `_GAIN`; the others 0."""
    stride = embed.stride[0]
    patches = F.unfold(pixels, stride, stride=stride).mT.flatten(0, 1).double()
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    variances, directions = variances[-count:].clamp_min(1e-12), directions[:, -count:]
    scales = variances**-0.25
    rows = (_GAIN * directions * scales / (variances * scales**2).mean().sqrt()).T
    nn.init.zeros_(embed.weight)
    nn.init.zeros_(embed.bias)  # type: ignore[arg-type]
    embed.weight[:count] = rows.view(count, *embed.weight.shape[1:]).to(embed.weight)
    embed.bias[:count] = -(rows @ patches.mean(dim=0)).to(embed.weight)  # type: ignore[index]


def _silence_branches(model: PAE) -> None:
    """Let every residual branch of modulator and decoder add nothing at first."""
    for part in (*model.modulator.modules(), *model.decoder.modules()):
        if isinstance(part, ModulatorLayer):
            branches = [part.self_attn.proj, part.cross_attn.proj, part.mlp.fc2]
        elif isinstance(part, TransformerBlock):
            branches = [part.attn.proj, part.mlp.fc2]
        else:
            continue
        for branch in branches:
            nn.init.zeros_(branch.weight)


def _pass_tokens(attention: SelfAttention) -> None:
    """Let an attention give each token itself: values by a rotation, which the output turns back."""
    start_at_self(attention, gain=3.0)
    width = attention.proj.in_features
    rotation = nn.init.orthogonal_(torch.empty(width, width))
    attention.qkv.weight[2 * width :] = rotation
    attention.proj.weight.copy_(rotation.T)


def _patches(images: Tensor, patch: int) -> Tensor:
    """All patches of images (B, 3, H, W) as rows (n, p p 3), in the order of `unpatchify`."""
    cut = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, p, p)
    return cut.permute(0, 2, 3, 4, 5, 1).reshape(-1, 3 * patch**2)


def _output_of(layer: nn.Module, call: Callable[[], object]) -> Tensor:
    """What a layer gives while something is called."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    call()
    handle.remove()
    return outputs[-1]


def _fit(linear: nn.Linear, inputs: Tensor, targets: Tensor) -> None:
    """Least squares with a small ridge: targets (n, E) of inputs (n, D)."""
    known = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1).double()
    square = known.T @ known
    ridge = 1e-4 * square.diagonal().mean() * torch.eye(len(square), device=square.device)
    solved = torch.linalg.solve(square + ridge, known.T @ targets.double()).to(linear.weight)
    linear.weight.copy_(solved[:-1].T)
    linear.bias.copy_(solved[-1])
