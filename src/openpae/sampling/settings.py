"""How samples are drawn and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from openpae.config import check_fields

Solver = Literal["euler", "heun", "multistep", "sde", "rk45"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn. The defaults are the paper's guided 80-epoch setting."""

    solver: Solver = "euler"
    """euler (the paper's), heun and multistep (after DPM-Solver++ 2M) follow the ODE; sde is the paper's for
    unguided samples: noisy steps and one without noise; rk45 is adaptive and slow, the others' reference."""
    steps: int = 249
    """Steps of the grid; rk45 chooses its own."""
    shift: float = 0.4
    """Shift of the grid: t' = s t / (1 + (s - 1) t); below 1 it spends more steps near the noise."""
    tolerance: float = 1e-5
    """Error that a step of rk45 may make; the other solvers have none."""
    guidance: float = 2.5
    """w of v_worse + w (v - v_worse); 1 is no guidance."""
    guidance_start: float = 0.25
    """Guide where t >= this; elsewhere the null class is not computed at all."""
    guidance_end: float = 1.0
    """Guide where t <= this."""
    tuned_on: str | None = None
    """What guidance and interval were tuned on; pae search-guidance writes it here, and every record repeats
    it."""

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

        Both are compared in float32, so that a grid position meant to be 0.3 is one.
        """
        start, here, end = np.array([self.guidance_start, t, self.guidance_end], np.float32)
        return self.guidance != 1 and bool(start <= here <= end)


Format = Literal["npz", "png", "safetensors", "latents"]
"""npz: samples.npz in the layout of ADM (arr_0 uint8 images, arr_1 labels); png: a folder of images, named by
their index; safetensors: images (n, 3, H, W) uint8 and labels; latents: the same of latents, float32, not
decoded."""


FILES: Mapping[Format, str] = {
    "npz": "samples.npz",
    "png": "images",
    "safetensors": "samples.safetensors",
    "latents": "latents.safetensors",
}
"""Where the samples of each format are."""
