"""The latent denoiser's features of the position, against NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from openpae.models.denoiser import LatentDenoiser


def test_positions_enter_as_a_thousandfold_of_themselves() -> None:
    """cos and sin of 1000 t 10000^(-i / 128), i = 0 ... 127: the range that DiT's features are made for."""
    network = LatentDenoiser(8, width=16, num_layers=1)
    seen: list[Tensor] = []
    network.embed_time.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = np.array([0.0, 0.013, 0.5, 0.87])
    network(torch.randn(4, 8, 4, 4), torch.from_numpy(t).float())
    angles = 1000 * t[:, None] * 10000 ** (-np.arange(128) / 128)
    expected = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1)).float()
    # 1000 t is rounded to float32, which turns the fastest wave by up to 1000 x 6e-8.
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=3e-4)
