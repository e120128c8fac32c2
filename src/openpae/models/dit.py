"""LightningDiT: the generator (Sec. 4.1 of arXiv:2605.07915; architecture of arXiv:2501.01423)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.configs import LightningDiTConfig
from openpae.models.generator import LatentGenerator
from openpae.models.layers import (
    resize_positions,
    rope_2d,
    rotate,
    run_blocks,
    sincos_2d,
    timestep_features,
    to_tokens,
    unpatchify,
)
from openpae.models.precision import own_precision


class Attention(nn.Module):
    """Self-attention with 2-D rotary positions and, optionally, RMS-normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
            self.k_norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, N, D); cos, sin: (N, D / heads). Returns (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.qk_norm:  # float32, as the weights of these norms under autocast
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out: Tensor = self.proj(
            F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        )
        return out


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), W1 and W2 in one layer."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D). Returns (..., D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class DiTBlock(nn.Module):
    """Transformer block with AdaLN-zero: the condition c gives shift, scale and gate of both branches.

    x <- x + gate_a Attn(RMSNorm(x) (1 + scale_a) + shift_a)
    x <- x + gate_m SwiGLU(RMSNorm(x) (1 + scale_m) + shift_m)
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm=qk_norm)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, int(2 / 3 * 4 * dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, N, D); c: silu of the condition, (B, 1, D), or (B, N, D) for one per token; cos, sin: see
        `Attention`. Returns (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, cos, sin)
        out: Tensor = x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)
        return out


class LightningDiT(LatentGenerator):
    """Velocity v(x_t, t, class) of noisy latents, normalised per channel. Arguments: see
    `LatentGenerator`."""

    config_class = LightningDiTConfig
    config: LightningDiTConfig

    positions: Tensor
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: LightningDiTConfig, *, checkpoint_blocks: int = 0) -> None:
        super().__init__(config, checkpoint_blocks=checkpoint_blocks)
        dim, patch, grid = config.hidden_dim, config.patch_size, config.token_grid
        self.patch_embed = nn.Conv2d(config.latent_dim, dim, patch, stride=patch)
        self.time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embed = nn.Embedding(config.num_classes + 1, dim)  # + 1: the null class
        self.blocks = nn.ModuleList(
            DiTBlock(dim, config.num_heads, qk_norm=config.qk_norm) for _ in range(config.num_layers)
        )
        self.final_norm = nn.RMSNorm(dim, eps=1e-6)
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.to_velocity = nn.Linear(dim, patch * patch * config.latent_dim)
        self.register_buffer("positions", sincos_2d(*grid, dim)[None], persistent=False)
        cos, sin = rope_2d(*grid, dim // config.num_heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._register_statistics(config.latent_dim, 1, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights as in DiT: Xavier, and 0 for the modulations and the output."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self._reset_conditioning(*self.blocks)

    @own_precision
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the velocity x_1 - x_0.

        Args:
            x: normalised noisy latents x_t, (B, C, h, w). On another grid than that of the config, the
                positions are interpolated.
            t: path positions, (B,), 0 = noise, 1 = data.
            labels: classes, (B,), in [0, K]; K is the null class.

        Returns:
            Velocity, (B, C, h, w).

        Raises:
            ValueError: h or w is not a multiple of the patch size.
        """
        if any(side % self.config.patch_size for side in x.shape[-2:]):
            raise ValueError(
                f"latents must have sides that are multiples of patch_size = {self.config.patch_size}, "
                f"got {tuple(x.shape)}"
            )
        embedded = self.patch_embed(x)
        h, w = embedded.shape[-2:]
        positions, cos, sin = self._positions(h, w)
        tokens = to_tokens(embedded) + positions
        c = F.silu(self.time_mlp(timestep_features(t)) + self.class_embed(labels))[:, None]
        tokens = run_blocks(self.blocks, tokens, (c, cos, sin), self.checkpoint_blocks)
        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        tokens = self.to_velocity(self.final_norm(tokens) * (1 + scale) + shift)
        return unpatchify(tokens, h, w, self.config.patch_size)

    def _positions(self, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fixed and rotary positions of a grid of h x w tokens."""
        trained = self.config.token_grid
        if (h, w) == trained:
            return self.positions, self.rope_cos, self.rope_sin
        head_dim = self.config.hidden_dim // self.config.num_heads
        cos, sin = rope_2d(h, w, head_dim, trained, self.positions.device)
        return resize_positions(self.positions, trained, h, w), cos, sin
