"""Initial weights of a tokenizer beyond those of ViT-MAE: the values local and patches of `start`.

Both are our choice, for short runs. With patches the first decodes already show the images, where random
weights start from grey (docs/results.md, docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.layers import SelfAttention, TransformerBlock
from openpae.models.modulator import DetailModulator, ModulatorLayer
from openpae.models.tokenizer import PAE, Autoencoder

_GAIN = 3.0
"""Scale of the components against the positions added to them, whose root mean square is 0.7."""


def start_local(model: Autoencoder) -> None:
    """Start both projectors of a `PAE` at each token itself, and the images with the spectrum of photographs.

    See `start_at_self` and `start_with_spectrum`. A `RAE` has no projectors: its images alone change.
    """
    if isinstance(model, PAE):
        for projector in (model.projector, model.deprojector):
            start_at_self(projector.attn)
    start_with_spectrum(model.decoder.to_pixels, model.decoder.patch_size)


@torch.no_grad()
def start_at_self(attention: SelfAttention, gain: float = 2.0) -> None:
    """Start self-attention at each token itself: queries and keys are one random rotation R of the input.

        Q = K = gain R,   logits gain^2 x_i . x_j / sqrt(head width), largest for i = j

    With unrelated queries and keys, an attention without residual starts as the mean of all tokens. Detail of
    a single token then passes only after training.
    """
    dim = attention.proj.in_features
    rotation = nn.init.orthogonal_(torch.empty(dim, dim))
    attention.qkv.weight[: 2 * dim] = (gain * rotation).repeat(2, 1).to(attention.qkv.weight)


@torch.no_grad()
def start_with_spectrum(to_pixels: nn.Linear, patch: int, scale: float = 0.2) -> None:
    """Start flat patches (`unpatchify`) with the spectrum of photographs, whose amplitude falls as 1 / f.

        W = sum_k (scale patch / f_k) b_k m_k^T

    b_k: cosine patterns (DCT-II) of three colours, grey at its frequency f_k, the two opponent colours at
    three times theirs; m_k: normal directions of variance 1 / width. For inputs of unit variance each pattern
    has an amplitude of scale patch / f_k. With equal variance for all pixels, training would first have to
    remove the noise in the fine patterns.
    """
    wave = torch.cos(torch.outer(torch.arange(patch), torch.arange(patch) + 0.5) * (math.pi / patch))
    wave = wave / wave.norm(dim=1, keepdim=True)  # (u, position)
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    patterns = torch.einsum("uy,vx,kc->uvkyxc", wave, wave, colours).flatten(3).flatten(0, 2)
    number = torch.arange(patch).float()
    frequency = torch.hypot(number[:, None], number).clamp_min(1)[..., None] * torch.tensor([1.0, 3.0, 3.0])
    width = to_pixels.in_features
    directions = torch.randn(len(patterns), width) * (scale * patch / width**0.5)
    to_pixels.weight.copy_(patterns.T @ (directions / frequency.flatten()[:, None]))


@torch.no_grad()
def start_from_patches(model: Autoencoder, images: Tensor, features: Tensor | None = None) -> None:
    """Initial weights with which the tokenizer passes the principal components of patches.

        d = V (p - mean p),  z = sphere([d, c]),  x_r = W decoder(z) + b

    V holds the C - 1 principal directions of the patches p of some images, scaled by the fourth root of the
    inverse variance, so that weak ones survive the sphere norm. They replace C - 1 channels of the features;
    the others stay. A constant c, as long as a usual d, preserves the length of d. The residual branches of
    modulator and decoder start at 0, both attentions at each token itself (`start_at_self`). The readout W, b
    is the least-squares fit to the pixels.

    Args:
        model: a tokenizer with fusion "modulate" whose width is at least its number of latent channels.
        images: in [0, 1], (B, 3, H, W), of the size of training; some thousand patches in all are enough.
        features: of these images, (B, N, D), where they are cached.

    Raises:
        ValueError: another fusion, or too narrow a model.
    """
    config = model.config
    if not isinstance(model, PAE) or config.fusion != "modulate":
        raise ValueError(f"start patches needs model.fusion modulate, got {config.fusion}; use another start")
    modulator, channels = model.modulator, config.latent_dim
    assert isinstance(modulator, DetailModulator)  # for the type checker: the fusion says so
    width = modulator.patch_embed.out_channels
    if width < channels:
        raise ValueError(f"start patches needs a width >= latent_dim = {channels}, got {width}")
    _embed_components(modulator.patch_embed, model.preprocess(images), channels - 1)
    _silence_branches(modulator, model.decoder)
    # u (1 + gamma) + beta: gamma = -1 where components come, beta = d.
    fusion = modulator.fusion.proj
    nn.init.zeros_(fusion.weight)
    nn.init.zeros_(fusion.bias)
    fusion.bias[: channels - 1] = -1
    fusion.weight[width:] = torch.eye(width) / _GAIN
    for projector in (model.projector, model.deprojector):
        _pass_tokens(projector.attn)
    to_latent, from_latent = model.projector.to_latent, model.deprojector.from_latent
    nn.init.zeros_(to_latent.weight)
    places = torch.arange(channels - 1)
    to_latent.weight[places, places, 1, 1] = 1
    _, latents = _pass_through(to_latent, lambda: model.encode(images, features))
    assert to_latent.bias is not None  # for the type checker
    to_latent.bias[-1] = latents[:, :-1].square().sum(dim=1).mean().sqrt()
    nn.init.zeros_(from_latent.weight)
    isometry = nn.init.orthogonal_(torch.empty(width, channels))
    from_latent.weight[..., 1, 1] = isometry * (width / channels) ** 0.5
    nn.init.orthogonal_(model.decoder.embed.weight)
    _fit_readout(model, images, features)


def _fit_readout(model: Autoencoder, images: Tensor, features: Tensor | None) -> None:
    """Set the decoder's last layer to the least-squares fit (with a small ridge) of its input to some
    images."""
    to_pixels, patch = model.decoder.to_pixels, model.decoder.patch_size
    tokens, _ = _pass_through(to_pixels, lambda: model.decode(model.encode(images, features)))
    pixels = (images - model.encoder_input.mean) / model.encoder_input.std
    cells = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, p, p)
    targets = cells.permute(0, 2, 3, 4, 5, 1).reshape(-1, 3 * patch**2)  # in the order of `unpatchify`
    inputs = F.pad(tokens.flatten(0, 1).double(), (0, 1), value=1.0)
    square = inputs.T @ inputs
    ridge = 1e-4 * square.diagonal().mean() * torch.eye(len(square), device=square.device)
    solution = torch.linalg.solve(square + ridge, inputs.T @ targets.double())
    to_pixels.weight.copy_(solution[:-1].T)
    to_pixels.bias.copy_(solution[-1])


def _pass_through(layer: nn.Module, call: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Input and output of a layer during a call."""
    passed: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: passed.append((inputs[0], output)))
    call()
    handle.remove()
    return passed[-1]


def _pass_tokens(attention: SelfAttention) -> None:
    """Let an attention output each token itself: values are a rotation, which the output reverses."""
    start_at_self(attention, gain=3.0)
    width = attention.proj.in_features
    rotation = nn.init.orthogonal_(torch.empty(width, width))
    attention.qkv.weight[2 * width :] = rotation
    attention.proj.weight.copy_(rotation.T)


def _silence_branches(*parts: nn.Module) -> None:
    """Let every residual branch of the parts add nothing at first."""
    for layer in (layer for part in parts for layer in part.modules()):
        if isinstance(layer, ModulatorLayer):
            branches = [layer.self_attn.proj, layer.cross_attn.proj, layer.mlp.fc2]
        elif isinstance(layer, TransformerBlock):
            branches = [layer.attn.proj, layer.mlp.fc2]
        else:
            continue
        for branch in branches:
            nn.init.zeros_(branch.weight)


def _embed_components(embed: nn.Conv2d, pixels: Tensor, count: int) -> None:
    """Let the first channels be the principal components of patches, times a gain; the others 0."""
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
