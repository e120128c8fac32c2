"""The projectors before and after the latent, and the ViT decoder from tokens to pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openpae.models.configs import DecoderConfig
from openpae.models.layers import (
    SelfAttention,
    TransformerBlock,
    init_vit,
    resize_positions,
    run_blocks,
    sincos_2d,
    to_grid,
    to_tokens,
    unpatchify,
)


class Projector(nn.Module):
    """Fused features to latents: self-attention (no residual, no norm), then a 3x3 convolution D -> C."""

    def __init__(self, dim: int, num_heads: int, latent_dim: int) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False)
        self.to_latent = nn.Conv2d(dim, latent_dim, 3, padding=1)
        init_vit(self)

    def forward(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """tokens: (B, h w, D). Returns latents before the sphere norm: (B, C, h, w)."""
        out: Tensor = self.to_latent(to_grid(self.attn(tokens), h, w))
        return out


class Deprojector(nn.Module):
    """Latents to features, the mirror of `Projector`: a 3x3 convolution C -> D, then self-attention."""

    def __init__(self, dim: int, num_heads: int, latent_dim: int) -> None:
        super().__init__()
        self.from_latent = nn.Conv2d(latent_dim, dim, 3, padding=1)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False)
        init_vit(self)

    def forward(self, z: Tensor) -> Tensor:
        """z: (B, C, h, w). Returns tokens: (B, h w, D)."""
        out: Tensor = self.attn(to_tokens(self.from_latent(z)))
        return out


class PixelDecoder(nn.Module):
    """ViT-MAE style decoder from tokens to normalised pixels.

    Args:
        dim: width D of the input tokens.
        config: its sizes.
        grid: (h, w) of the positions; for another grid they are interpolated.
    """

    positions: Tensor

    def __init__(self, dim: int, config: DecoderConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        width = config.hidden_dim
        self.patch_size, self.grid = config.patch_size, grid
        self.checkpoint_blocks = 0  # see `run_blocks`
        self.embed = nn.Linear(dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_2d(*grid, width)[None], persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.num_heads, config.mlp_dim, norm_eps=1e-12)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.to_pixels = nn.Linear(width, 3 * config.patch_size**2)
        init_vit(self)

    def forward(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """tokens: (B, h w, D). Returns normalised pixels: (B, 3, h patch, w patch)."""
        x = self.embed(tokens) + resize_positions(self.positions, self.grid, h, w)
        # The CLS token has no position. It comes first, and is dropped after the last block.
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = run_blocks(self.blocks, x, (), self.checkpoint_blocks)
        return unpatchify(self.to_pixels(self.norm(x)[:, 1:]), h, w, self.patch_size)
