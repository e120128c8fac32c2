"""The denoiser of the diffusion loss on the latent, a generic regulariser of Table 3(a)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.layers import timestep_features


class LatentDenoiser(nn.Module):
    """Velocity by a few convolutions, for the light diffusion loss on the latent (Table 3a).

    The velocity starts at 0. Our choice: the paper says only "light".

    Args:
        latent_dim: channels C.
        width: channels of the residual layers.
        num_layers: residual layers, each a 3x3 convolution; t scales and shifts its input.
    """

    def __init__(self, latent_dim: int, width: int = 128, num_layers: int = 3) -> None:
        super().__init__()
        self.embed_time = nn.Sequential(nn.Linear(256, width), nn.SiLU())
        self.from_latent = nn.Conv2d(latent_dim, width, 3, padding=1)
        self.layers = nn.ModuleList(DenoiserLayer(width) for _ in range(num_layers))
        self.to_velocity = nn.Conv2d(width, latent_dim, 3, padding=1)
        nn.init.zeros_(self.to_velocity.weight)
        nn.init.zeros_(self.to_velocity.bias)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t: noisy latents, (B, C, h, w); t: positions, (B,), in [0, 1]. Returns v: (B, C, h, w)."""
        time = self.embed_time(timestep_features(1000 * t))  # 1000: the range of DiT's features
        x = self.from_latent(x_t)
        for layer in self.layers:
            x = layer(x, time)
        velocity: Tensor = self.to_velocity(x)
        return velocity


class DenoiserLayer(nn.Module):
    """x + Conv(SiLU(norm(x) (1 + gamma(t)) + beta(t)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.to_scale_shift = nn.Linear(width, 2 * width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, width, h, w); time: (B, width). Returns (B, width, h, w)."""
        gamma, beta = self.to_scale_shift(time)[..., None, None].chunk(2, dim=1)
        out: Tensor = x + self.conv(F.silu(self.norm(x) * (1 + gamma) + beta))
        return out
