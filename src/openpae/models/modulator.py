"""The Detail-Aware Modulator (DAM): adds detail of the pixels to the VFM's features (Sec. 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from openpae.models.layers import (
    CrossAttention,
    Mlp,
    SelfAttention,
    init_vit,
    resize_positions,
    sincos_2d,
    to_tokens,
)


class ModulatorLayer(nn.Module):
    """One layer: self-attention, cross-attention to the VFM and an MLP, each with pre-norm and residual.

    d <- d + SA(LN d),   d <- d + CA(LN_q d, LN_kv u),   d <- d + MLP(LN d)
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, num_heads)
        self.norm_query = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, detail: Tensor, features: Tensor) -> Tensor:
        """detail d and features u: (B, N, D) each. Returns d: (B, N, D)."""
        detail = detail + self.self_attn(self.norm_self(detail))
        detail = detail + self.cross_attn(self.norm_query(detail), self.norm_context(features))
        out: Tensor = detail + self.mlp(self.norm_mlp(detail))
        return out


class DetailFusion(nn.Module):
    """Change frozen features u by pixel detail d (last step of the DAM; Table 3b compares the three kinds).

    modulate   LN(u (1 + gamma(d)) + beta(d))    starts at LN(u)
    add        LN(u + W d)                       starts at LN(u)
    concat     LN(W [u, d])
    """

    def __init__(self, dim: int, kind: Literal["modulate", "add", "concat"]) -> None:
        super().__init__()
        self.kind = kind
        inputs, outputs = {"modulate": (dim, 2 * dim), "add": (dim, dim), "concat": (2 * dim, dim)}[kind]
        self.proj = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(dim)

    def reset_parameters(self) -> None:
        """Set modulate and add to 0, so that training starts at the features of the VFM."""
        if self.kind != "concat":
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def forward(self, features: Tensor, detail: Tensor) -> Tensor:
        """features u and detail d: (B, N, D) each. Returns (B, N, D)."""
        if self.kind == "modulate":
            gamma, beta = self.proj(detail).chunk(2, dim=-1)
            fused = features * (1 + gamma) + beta
        elif self.kind == "add":
            fused = features + self.proj(detail)
        else:
            fused = self.proj(torch.cat([features, detail], dim=-1))
        out: Tensor = self.norm(fused)
        return out


class DetailModulator(nn.Module):
    """Detail-Aware Modulator (DAM): pixel detail by attention to the features, fused with them (Sec. 3.1).

    Args:
        dim: width D.
        num_heads: attention heads.
        num_layers: layers K.
        stride: pixels per token of the VFM's input.
        grid: (h, w) of the positions; for another grid they are interpolated.
        fusion: how the detail changes the features.
    """

    positions: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        stride: int,
        grid: tuple[int, int],
        fusion: Literal["modulate", "add", "concat"],
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, stride, stride=stride)
        self.grid = grid
        self.register_buffer("positions", sincos_2d(*grid, dim)[None], persistent=False)
        self.layers = nn.ModuleList(ModulatorLayer(dim, num_heads) for _ in range(num_layers))
        self.fusion = DetailFusion(dim, fusion)
        init_vit(self)
        self.fusion.reset_parameters()

    def forward(self, pixels: Tensor, features: Tensor) -> Tensor:
        """pixels: input of the VFM, (B, 3, h stride, w stride); features u: (B, N, D). Returns (B, N, D)."""
        embedded = self.patch_embed(pixels)
        positions: Tensor = resize_positions(self.positions, self.grid, *embedded.shape[-2:])
        detail = to_tokens(embedded) + positions
        for layer in self.layers:
            detail = layer(detail, features)
        out: Tensor = self.fusion(features, detail)
        return out


class NoModulator(nn.Module):
    """Takes the place of the modulator if the VFM is finetuned (fusion finetune of Table 3b)."""

    def forward(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Returns the features unchanged, (B, N, D)."""
        return features
