"""Settings of sampling, and formats of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from openpae.config import check_fields

Solver = Literal["euler", "heun", "multistep", "adams", "sde", "rk45"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Solver and guidance. The defaults are the paper's guided 80-epoch setting."""

    solver: Solver = "euler"
    """euler (the paper's), heun, multistep (after DPM-Solver++ 2M) and adams (third order) follow the ODE;
    sde is the paper's for unguided samples: noisy steps, and a last one without noise; rk45 is adaptive, slow
    and most exact."""
    steps: int = 249
    """Steps of the grid; rk45 chooses its own."""
    shift: float = 0.4
    """Shift of the grid: t' = s t / (1 + (s - 1) t); below 1 it spends more steps near the noise."""
    tolerance: float = 1e-5
    """Error of a step of rk45, absolute and relative; the other solvers ignore it."""
    guidance: float = 2.5
    """w of v_weak + w (v - v_weak); 1 is no guidance."""
    guidance_start: float = 0.25
    """Guide where t >= this; elsewhere the null class is not computed."""
    guidance_end: float = 1.0
    """Guide where t <= this."""
    tuned_on: str | None = None
    """What guidance and interval were tuned on; pae search-guidance sets it, and every record repeats it."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            steps="[1, 1000000]",
            shift="(0, inf)",
            tolerance="(0, 1)",
            guidance_start="[0, 1]",
            guidance_end="[0, 1]",
        )
        if self.guidance_start > self.guidance_end:
            raise ValueError(
                f"guidance_start must not exceed guidance_end, got {self.guidance_start} and "
                f"{self.guidance_end}; guidance 1 switches guidance off"
            )

    def guides_at(self, t: float) -> bool:
        """Whether the velocity is guided at position t.

        Positions are compared in float32, the type of the grid, so that a position 0.3 equals a start of 0.3.
        """
        start, position, end = np.array([self.guidance_start, t, self.guidance_end], np.float32)
        return self.guidance != 1 and bool(start <= position <= end)


Format = Literal["npz", "png", "safetensors", "latents"]
"""npz: samples.npz in the layout of ADM (arr_0 uint8 images, arr_1 labels); png: a folder of images named by
index; safetensors: images (n, 3, H, W) uint8 and labels; latents: latents (n, C, h, w) float32 and labels."""


FILES: Mapping[Format, str] = {
    "npz": "samples.npz",
    "png": "images",
    "safetensors": "samples.safetensors",
    "latents": "latents.safetensors",
}
"""The file or folder of each format."""
