"""LightningDiT: the generator (Sec. 4.1 of arXiv:2605.07915; architecture of arXiv:2501.01423)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.configs import LightningDiTConfig
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
from openpae.storage import hub


class Attention(nn.Module):
    """Self-attention with 2-D rotary positions and, if asked for, RMS-normalised queries and keys."""

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
        if self.qk_norm:  # float32: under autocast the weights of these norms are, and so the input must be
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
    """Transformer block under adaptive layer norm: c gives shift, scale and gate of both branches
    (AdaLN-zero).

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
        """x: (B, N, D); c: silu of the condition, (B, 1, D) or one for each token, (B, N, D). Returns
        (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, cos, sin)
        out: Tensor = x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)
        return out


def checked_statistics(mean: Tensor, std: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents, each in one of the shapes, ready to be broadcast to (C, h, w).

    Raises:
        ValueError: another shape, or a channel that does not vary.
    """
    if mean.shape != std.shape or tuple(mean.shape) not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"mean and std must be {allowed}, got {tuple(mean.shape)} and {tuple(std.shape)}")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(
            f"statistics must be finite and std > 0, got mean {mean.tolist()} and std {std.tolist()}; "
            "a latent channel that never varies cannot be generated"
        )
    return (mean.view(-1, 1, 1), std.view(-1, 1, 1)) if mean.ndim == 1 else (mean, std)


class LightningDiT(nn.Module):
    """Velocity of noisy latents: v(x_t, t, class).

    It works on latents normalised per channel; the statistics travel with it as buffers, so that
    `normalise` and `denormalise` cannot be forgotten or taken from another tokenizer.

    Args:
        config: its sizes.
        checkpoint_blocks: see `run_blocks`; it changes what training costs, not what the model is.
    """

    positions: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    latent_mean: Tensor
    latent_std: Tensor
    made_with: str | None = None
    """Fingerprint of the tokenizer whose latents it makes, known where it was loaded; saving needs it."""

    def __init__(self, config: LightningDiTConfig, *, checkpoint_blocks: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks
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
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim, 1, 1))
        self.register_buffer("latent_std", torch.ones(config.latent_dim, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As DiT: Xavier everywhere, and zero where a block or the output would disturb the identity."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for layer in self.time_mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        # Zero: every block starts as the identity, the velocity as zero (AdaLN-zero).
        zeros = [block.get_submodule("modulation") for block in self.blocks]
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
            x: normalised noisy latents x_t, (B, C, h, w). On another grid than the config's, positions are
                interpolated from it.
            t: path positions, (B,), 0 = noise, 1 = data.
            labels: classes, (B,), in [0, K]; K is the null class.

        Returns:
            Velocity, (B, C, h, w).

        Raises:
            ValueError: h or w is no multiple of the patch size.
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

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take the per-channel mean and standard deviation (C,) of the latents that are to be generated.

        Raises:
            ValueError: not one of each per channel, or a channel that does not vary.
        """
        mean, std = checked_statistics(mean, std, (self.config.latent_dim,))
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def normalise(self, z: Tensor) -> Tensor:
        """Latents as the tokenizer gives them to latents of zero mean and unit variance per channel."""
        return (z.float() - self.latent_mean) / self.latent_std

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return x.float() * self.latent_std + self.latent_mean

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, revision: str | None = None) -> LightningDiT:
        """A saved generator in evaluation mode, with the statistics of its latents.

        Args:
            name_or_folder: a model or run folder, or a name OWNER/NAME of the hub.
            revision: branch, tag or commit of the hub.

        Raises:
            FileNotFoundError: neither a folder nor a name that the hub has, or it cannot be reached.
            ValueError: another kind of model, or damaged or unfitting weights.
        """
        model, made_with = hub.load_saved(cls, LightningDiTConfig, name_or_folder, revision)
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
