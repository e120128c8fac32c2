"""Initial weights of a tokenizer beyond those of ViT-MAE: the values local, dct and patches of `start`.

All are our choice, for short runs. With dct and patches the first decodes already show the images, where
random weights start from grey (docs/results.md, docs/log.md).
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

_DETAIL_GAIN, _ANCHOR, _BRANCH_SCALE = 8.0, 4.0, 0.3
"""dct: weight of the detail against the VFM's features, value of the constant channel, and scale of the
residual branches; compared in docs/log.md."""
_COMPONENT_GAIN = 3.0
"""patches: scale of the components against the positions added to them, whose root mean square is 0.7."""


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
        three times theirs; m_k: normal directions of variance 1 / width. For inputs of unit variance each
        pattern has an amplitude of scale patch / f_k. With equal variance for all pixels, training would
        first have to remove the noise in the fine patterns.
    """
    wave = torch.cos(torch.outer(torch.arange(patch), torch.arange(patch) + 0.5) * (math.pi / patch))
    wave = wave / wave.norm(dim=1, keepdim=True)  # (u, position)
    patterns = torch.einsum("uy,vx,kc->uvkyxc", wave, wave, _colours()).flatten(3).flatten(0, 2)
    frequency = _frequencies(patch).clamp_min(1)[..., None] * torch.tensor([1.0, 3.0, 3.0])
    width = to_pixels.in_features
    directions = torch.randn(len(patterns), width) * (scale * patch / width**0.5)
    to_pixels.weight.copy_(patterns.T @ (directions / frequency.flatten()[:, None]))


@torch.no_grad()
def start_as_transform(model: Autoencoder) -> None:
    """Start C - 1 latent channels as the lowest DCT-II coefficients of each patch, the last as a constant.

    Grey patterns count at their frequency, colours at 2.2 times theirs. The constant preserves the contrast,
    which the sphere norm would remove. The residual branches start small and leave the channels of the
    coefficients unchanged. The last layer keeps its weights: call `fit_readout` next.

    Raises:
        ValueError: the fusion is not modulate, or the tokenizer is narrower than C - 1.
    """
    pae, modulator = _with_modulator(model, "dct")
    decoder, count = pae.decoder, pae.config.latent_dim - 1
    dim, width = modulator.patch_embed.out_channels, decoder.to_pixels.in_features
    if count > min(dim, width):
        raise ValueError(f"start dct needs a width of at least {count}, got {dim} and {width} in the decoder")
    enter, leave = _steady(modulator.positions[0], count), _steady(decoder.positions[0], count)
    patterns, scale = _patterns(decoder.patch_size, modulator.patch_embed.kernel_size[0], count)
    modulator.patch_embed.weight[enter] = patterns.permute(0, 3, 1, 2) * (0.5 * scale[:, None, None, None])
    assert modulator.patch_embed.bias is not None  # for the type checker
    modulator.patch_embed.bias[enter] = -modulator.positions[0][:, enter].mean(dim=0)
    for layer in modulator.layers:
        _spare(layer, enter)
    if isinstance(pae.narrow, nn.Linear):
        pae.narrow.weight[enter] = 0
        pae.narrow.bias[enter] = 0
    modulator.fusion.proj.weight[dim + enter, enter] = _DETAIL_GAIN
    for projector in (pae.projector, pae.deprojector):
        _pass_tokens(projector.attn, gain=4.0, rotate=False)
    channels = torch.arange(count)
    to_latent, from_latent = pae.projector.to_latent, pae.deprojector.from_latent
    to_latent.weight.mul_(0.1)
    to_latent.weight[:count] = 0
    to_latent.weight[channels, enter, 1, 1] = 1
    to_latent.weight[count] = 0
    assert to_latent.bias is not None  # for the type checker
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
def start_from_patches(model: Autoencoder, images: Tensor, features: Tensor | None = None) -> None:
    """Initial weights with which the tokenizer passes the principal components of patches.

        d = V (p - mean p),  z = sphere([d, c]),  x_r = W decoder(z) + b

    V holds the C - 1 principal directions of the patches p of some images, scaled by the fourth root of the
    inverse variance, so that weak ones survive the sphere norm. They replace C - 1 channels of the features;
    the others stay. A constant c, as long as a usual d, preserves the length of d. The residual branches of
    modulator and decoder start at 0, both attentions at each token itself (`start_at_self`). The readout W, b
    is `fit_readout`.

    Args:
        model: a tokenizer with fusion "modulate" whose width is at least its number of latent channels.
        images: in [0, 1], (B, 3, H, W), of the size of training; some thousand patches in all are enough.
        features: of these images, (B, N, D), where they are cached.

    Raises:
        ValueError: another fusion, or too narrow a model.
    """
    pae, modulator = _with_modulator(model, "patches")
    channels = pae.config.latent_dim
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
    fusion.weight[width:] = torch.eye(width) / _COMPONENT_GAIN
    for projector in (pae.projector, pae.deprojector):
        _pass_tokens(projector.attn, gain=3.0, rotate=True)
    to_latent, from_latent = pae.projector.to_latent, pae.deprojector.from_latent
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
    fit_readout(model, images, features, ridge_dtype=torch.float32)


@torch.no_grad()
def fit_readout(
    model: Autoencoder,
    images: Tensor,
    features: Tensor | None = None,
    *,
    ridge_dtype: torch.dtype = torch.float64,
) -> None:
    """Set the decoder's last layer to the least-squares fit (with a small ridge) of its input to some images.

    Args:
        model: with any initial weights.
        images: in [0, 1], (B, 3, H, W).
        features: of these images, (B, N, D), where they are cached.
        ridge_dtype: the ridge is rounded to it. Each start keeps its own, so that its bits stay as measured.
    """
    to_pixels, patch = model.decoder.to_pixels, model.decoder.patch_size
    tokens, _ = _pass_through(to_pixels, lambda: model.decode(model.encode(images, features)))
    pixels = (images - model.encoder_input.mean) / model.encoder_input.std
    cells = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, p, p)
    targets = cells.permute(0, 2, 3, 4, 5, 1).reshape(-1, 3 * patch**2)  # in the order of `unpatchify`
    inputs = F.pad(tokens.flatten(0, 1).double(), (0, 1), value=1.0)
    square = inputs.T @ inputs
    ridge = 1e-4 * square.diagonal().mean() * torch.eye(len(square), dtype=ridge_dtype, device=square.device)
    solution = torch.linalg.solve(square + ridge, inputs.T @ targets.double())
    to_pixels.weight.copy_(solution[:-1].T)
    to_pixels.bias.copy_(solution[-1])


def _with_modulator(model: Autoencoder, start: str) -> tuple[PAE, DetailModulator]:
    fusion = model.config.fusion
    if fusion != "modulate":
        raise ValueError(f"start {start} needs model.fusion modulate, got {fusion}; use another start")
    assert isinstance(model, PAE)  # for the type checker: the fusion implies both
    assert isinstance(model.modulator, DetailModulator)
    return model, model.modulator


def _pass_through(layer: nn.Module, call: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Input and output of a layer during a call."""
    passed: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: passed.append((inputs[0], output)))
    call()
    handle.remove()
    return passed[-1]


def _pass_tokens(attention: SelfAttention, gain: float, *, rotate: bool) -> None:
    """Let an attention output each token itself; values are rotated at random if asked, and rotated back."""
    start_at_self(attention, gain)
    width = attention.proj.in_features
    values = nn.init.orthogonal_(torch.empty(width, width)) if rotate else torch.eye(width)
    attention.qkv.weight[2 * width :] = values
    attention.proj.weight.copy_(values.T)


def _steady(positions: Tensor, count: int) -> Tensor:
    """The channels in which the positions (N, D) vary least."""
    return positions.std(dim=0).argsort(stable=True)[:count]


def _spare(block: nn.Module, channels: Tensor) -> None:
    """Let the residual branches of a block start small, and leave some channels unchanged."""
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in ("proj", "fc2"):
            layer.weight.mul_(_BRANCH_SCALE)
            layer.weight[channels] = 0


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
    rows = (_COMPONENT_GAIN * directions * scales / (variances * scales**2).mean().sqrt()).T
    nn.init.zeros_(embed.weight)
    nn.init.zeros_(embed.bias)  # type: ignore[arg-type]
    embed.weight[:count] = rows.view(count, *embed.weight.shape[1:]).to(embed.weight)
    embed.bias[:count] = -(rows @ patches.mean(dim=0)).to(embed.weight)  # type: ignore[index]


def _patterns(patch: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """The lowest `count` patterns of a patch, drawn at `size` pixels: (count, size, size, 3), and scales.

    The patterns give the coefficients of the patch at every size; the scales equalise them.
    """
    waves = torch.arange(patch).float().outer((torch.arange(size) + 0.5) * (patch / size)) * (math.pi / patch)
    norms = torch.full((patch,), (patch / 2) ** 0.5)
    norms[0] = patch**0.5
    waves = waves.cos() / norms[:, None] * (patch / size)
    patterns = torch.einsum("uy,vx,kc->uvkyxc", waves, waves, _colours()).flatten(0, 2)
    frequency = _frequencies(patch).clamp_min(0.5)[..., None] * torch.tensor([1.0, 2.2, 2.2])
    order = frequency.flatten().argsort(stable=True)[:count]
    scale = (frequency.flatten()[order] / patch).sqrt()
    return patterns[order], scale / scale.mean()


def _colours() -> Tensor:
    """Grey and the two opponent colours, as rows of unit length (3, 3)."""
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    return colours / colours.norm(dim=1, keepdim=True)


def _frequencies(patch: int) -> Tensor:
    """Frequencies of the two-dimensional cosines of a patch, (patch, patch)."""
    number = torch.arange(patch).float()
    frequencies: Tensor = torch.hypot(number[:, None], number)
    return frequencies
