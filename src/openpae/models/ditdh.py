"""DiT-DH: a DiT with a wide, shallow head, the generator of RAE (Sec. 5 of arXiv:2510.11690).

A network narrower than the number of latent channels cannot represent their noise, and a wide DiT is costly.
So a DiT of usual width conditions a head of a few wide blocks. Both read the noisy latents, and the head
gives the velocity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.configs import DiTDHConfig, GeneratorConfig, LightningDiTConfig
from openpae.models.dit import DiTBlock, LightningDiT
from openpae.models.generator import LatentGenerator
from openpae.models.layers import rope_2d, run_blocks, sincos_2d, to_tokens, unpatchify
from openpae.models.precision import own_precision


class DiTDH(LatentGenerator):
    """Velocity v(x_t, t, class) of noisy latents, by a DiT M and a wide head H.

        s   = silu(W M(x_t | t, class) + time)      condition of each token
        v   = H(x_t | s)                            AdaLN of the head: shift, scale and gate for each token

    As in RAE's code, the DiT has fixed and rotary positions, the head only rotary ones. Time enters as random
    Fourier features of the noise level 1 - t, and a condition passes silu once more before each AdaLN.

    Args:
        config: its sizes.
        checkpoint_blocks: see `layers.run_blocks`; the blocks of the DiT come first, then those of the head.
    """

    config_class = DiTDHConfig
    config: DiTDHConfig
    frequencies: Tensor
    positions: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    head_cos: Tensor
    head_sin: Tensor

    def __init__(self, config: DiTDHConfig, *, checkpoint_blocks: int = 0) -> None:
        super().__init__(config, checkpoint_blocks=checkpoint_blocks)
        dim, wide = config.hidden_dim, config.head.hidden_dim
        channels, patch = config.latent_dim, config.patch_size
        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.head_embed = nn.Conv2d(channels, wide, patch, stride=patch)
        self.register_buffer("frequencies", torch.randn(256))  # 256, N(0, 1): RAE's; fixed, and saved
        self.time_mlp = nn.Sequential(nn.Linear(2 * 256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embed = nn.Embedding(config.num_classes + 1, dim)  # + 1: the null class
        self.blocks = nn.ModuleList(
            DiTBlock(dim, config.num_heads, qk_norm=config.qk_norm) for _ in range(config.num_layers)
        )
        self.to_head = nn.Linear(dim, wide)
        self.head_blocks = nn.ModuleList(
            DiTBlock(wide, config.head.num_heads, qk_norm=config.qk_norm)
            for _ in range(config.head.num_layers)
        )
        self.final_norm = nn.RMSNorm(wide, eps=1e-6)
        self.final_modulation = nn.Linear(wide, 2 * wide)
        self.to_velocity = nn.Linear(wide, patch * patch * channels)
        self.register_buffer("positions", sincos_2d(*config.token_grid, dim)[None], persistent=False)
        for name, width, heads in (("rope", dim, config.num_heads), ("head", wide, config.head.num_heads)):
            cos, sin = rope_2d(*config.token_grid, width // heads)
            self.register_buffer(f"{name}_cos", cos, persistent=False)
            self.register_buffer(f"{name}_sin", sin, persistent=False)
        self._register_statistics(*config.latent_shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights as in RAE's code: PyTorch's, except for the embeddings, and 0 for the modulations
        and the output."""
        for embed in (self.patch_embed, self.head_embed):
            nn.init.xavier_uniform_(embed.weight.view(embed.weight.shape[0], -1))
            if embed.bias is not None:
                nn.init.zeros_(embed.bias)
        self._reset_conditioning(*self.blocks, *self.head_blocks)

    @own_precision
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the velocity x_1 - x_0.

        Args:
            x: normalised noisy latents x_t, (B, C, h, w).
            t: path positions, (B,), 0 = noise, 1 = data.
            labels: classes, (B,), in [0, K]; K is the null class.

        Returns:
            Velocity, (B, C, h, w).
        """
        h, w = self.config.token_grid
        time = self.time_mlp(self._fourier(1 - t))[:, None]  # (B, 1, D)
        c = F.silu(F.silu(time + self.class_embed(labels)[:, None]))
        tokens = to_tokens(self.patch_embed(x)) + self.positions
        tokens = run_blocks(self.blocks, tokens, (c, self.rope_cos, self.rope_sin), self.checkpoint_blocks)
        s = F.silu(self.to_head(F.silu(time + tokens)))  # (B, N, W)
        left = self.checkpoint_blocks - len(self.blocks)
        # The residual stream stays in float32, as in the DiT, whose float32 positions are added to it.
        wide = to_tokens(self.head_embed(x)).float()
        wide = run_blocks(self.head_blocks, wide, (s, self.head_cos, self.head_sin), left)
        shift, scale = self.final_modulation(s).chunk(2, dim=-1)
        wide = self.to_velocity(self.final_norm(wide) * (1 + scale) + shift)
        return unpatchify(wide, h, w, self.config.patch_size)

    @property
    def _statistics_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.config.latent_dim,), self.config.latent_shape)

    def _fourier(self, level: Tensor) -> Tensor:
        """Sines and cosines of noise levels (B,) in [0, 1] at the fixed random frequencies: (B, 512)."""
        angles = 2 * math.pi * level.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


GENERATORS: tuple[type[GeneratorConfig], ...] = (LightningDiTConfig, DiTDHConfig)
"""The config classes that `build_generator` takes."""


def build_generator(config: GeneratorConfig, *, checkpoint_blocks: int = 0) -> LatentGenerator:
    """A new generator of the class of its config.

    Args:
        config: its sizes.
        checkpoint_blocks: see `layers.run_blocks`.
    """
    if isinstance(config, DiTDHConfig):
        return DiTDH(config, checkpoint_blocks=checkpoint_blocks)
    return LightningDiT(config, checkpoint_blocks=checkpoint_blocks)
