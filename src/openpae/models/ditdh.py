"""DiT-DH: a DiT with a wide, shallow head, the generator of RAE (Sec. 5 of arXiv:2510.11690).

A width below the number of latent channels cannot carry the noise of all of them, and to widen a whole DiT
costs much. So a DiT of usual width looks at the noisy latents and leads a head of a few wide blocks, which
looks at them too and gives the velocity.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.configs import DiTDHConfig, GeneratorConfig, LightningDiTConfig
from openpae.models.dit import DiTBlock, LightningDiT, checked_statistics, run_blocks
from openpae.models.layers import rope_2d, sincos_2d, to_tokens, unpatchify
from openpae.storage import hub


class DiTDH(nn.Module):
    """Velocity of noisy latents: v(x_t, t, class), by a DiT M and a wide head H.

        s   = silu(W M(x_t | t, class) + time)      what the DiT makes of each token
        v   = H(x_t | s)                            AdaLN of the head: shift, scale and gate for each token

    As in RAE's code, the DiT has fixed positions and the head only rotary ones, time enters as random Fourier
    features of the noise level 1 - t, and a condition passes silu once more before each AdaLN.

    Args:
        config: its sizes.
        checkpoint_blocks: see `dit.run_blocks`; the blocks of the DiT come first, then those of the head.
    """

    frequencies: Tensor
    positions: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    head_cos: Tensor
    head_sin: Tensor
    latent_mean: Tensor
    latent_std: Tensor
    made_with: str | None = None
    """Fingerprint of the tokenizer whose latents it makes, known where it was loaded; saving needs it."""

    def __init__(self, config: DiTDHConfig, *, checkpoint_blocks: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks
        dim, wide, channels, patch = (
            *(config.hidden_dim, config.head.hidden_dim),
            *(config.latent_dim, config.patch_size),
        )
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
        for name, width, heads in (
            ("rope", dim, config.num_heads),
            ("head", wide, config.head.num_heads),
        ):
            cos, sin = rope_2d(*config.token_grid, width // heads)
            self.register_buffer(f"{name}_cos", cos, persistent=False)
            self.register_buffer(f"{name}_sin", sin, persistent=False)
        self.register_buffer("latent_mean", torch.zeros(config.latent_shape))
        self.register_buffer("latent_std", torch.ones(config.latent_shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As RAE's code: PyTorch's own but for the embeddings, and zero where a block or the output would
        disturb the identity."""
        for embed in (self.patch_embed, self.head_embed):
            nn.init.xavier_uniform_(embed.weight.view(embed.weight.shape[0], -1))
            if embed.bias is not None:
                nn.init.zeros_(embed.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for layer in self.time_mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        # Zero: every block starts as the identity, the velocity as zero (AdaLN-zero).
        zeros = [block.get_submodule("modulation") for block in (*self.blocks, *self.head_blocks)]
        for layer in [*zeros, self.final_modulation, self.to_velocity]:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    @property
    def null_label(self) -> int:
        """The label that means no class."""
        return self.config.num_classes

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
        tokens = run_blocks(self.blocks, tokens, c, self.rope_cos, self.rope_sin, self.checkpoint_blocks)
        s = F.silu(self.to_head(F.silu(time + tokens)))  # (B, N, W)
        left = self.checkpoint_blocks - len(self.blocks)
        # The path from block to block is kept in float32, as positions keep that of the DiT.
        wide = to_tokens(self.head_embed(x)).float()
        wide = run_blocks(self.head_blocks, wide, s, self.head_cos, self.head_sin, left)
        shift, scale = self.final_modulation(s).chunk(2, dim=-1)
        wide = self.to_velocity(self.final_norm(wide) * (1 + scale) + shift)
        return unpatchify(wide, h, w, self.config.patch_size)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take mean and standard deviation of the latents that are to be generated: per channel, (C,), or per
        channel and place, (C, h, w), as in RAE's release.

        Raises:
            ValueError: neither shape, or a channel that does not vary.
        """
        mean, std = checked_statistics(mean, std, (self.config.latent_dim,), self.config.latent_shape)
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def normalise(self, z: Tensor) -> Tensor:
        """Latents as the tokenizer gives them to latents of zero mean and unit variance."""
        return (z.float() - self.latent_mean) / self.latent_std

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return x.float() * self.latent_std + self.latent_mean

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, revision: str | None = None) -> DiTDH:
        """A saved generator in evaluation mode, with the statistics of its latents.

        Args:
            name_or_folder: a model or run folder, or a name OWNER/NAME of the hub.
            revision: branch, tag or commit of the hub.

        Raises:
            FileNotFoundError: neither a folder nor a name that the hub has, or it cannot be reached.
            ValueError: another kind of model, or damaged or unfitting weights.
        """
        model, made_with = hub.load_saved(cls, DiTDHConfig, name_or_folder, revision)
        model.made_with = made_with
        return model

    def save_pretrained(self, folder: str | Path, *, precision: hub.Precision = "fp32") -> None:
        """Write a folder that `from_pretrained` loads: safetensors, config and model card.

        Args:
            folder: where; replaced if it holds nothing but a saved model.
            precision: of the parameters in the file.

        Raises:
            ValueError: `made_with` is not known, or the folder holds something else.
        """
        hub.save(self, folder, made_with=self.made_with, precision=precision)

    def push_to_hub(self, repo: str, *, licence: str | None = None, private: bool = False) -> str:
        """Save and upload to the hub; see `hub.push`. Returns the address."""
        return hub.push_saved(self.save_pretrained, repo, licence=licence, private=private)

    def _fourier(self, level: Tensor) -> Tensor:
        """Noise levels (B,) in [0, 1] to sines and cosines at the fixed random frequencies: (B, 512)."""
        angles = 2 * math.pi * level.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


Generator = LightningDiT | DiTDH
"""What training, sampling and checkpoints work with."""
GENERATORS: tuple[type[GeneratorConfig], ...] = (LightningDiTConfig, DiTDHConfig)
"""The classes of configs that `build_generator` takes."""


def build_generator(config: GeneratorConfig, *, checkpoint_blocks: int = 0) -> Generator:
    """A new generator of the class that its config belongs to.

    Args:
        config: its sizes.
        checkpoint_blocks: see `dit.run_blocks`.
    """
    if isinstance(config, DiTDHConfig):
        return DiTDH(config, checkpoint_blocks=checkpoint_blocks)
    return LightningDiT(config, checkpoint_blocks=checkpoint_blocks)
