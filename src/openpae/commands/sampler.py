"""The sampler options of several commands, and the models that they load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from openpae import config as configs
from openpae.commands.console import Precision, at_least_one
from openpae.sampling.settings import SamplerConfig, Solver

if TYPE_CHECKING:
    from openpae.sampling.pipeline import SamplingModels


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """A sampler preset, and flags that change it."""

    preset: str = "official-250"
    """official-250 (the paper's guided samples), official-sde (its unguided samples), fast-28, fast-45,
    few-15, or a file of kind SamplerConfig, such as best.yaml of pae search-guidance. The flags below change
    it."""
    solver: Solver | None = None
    """euler, heun, multistep (second order) and adams (third) solve the ODE, sde the SDE; rk45 is adaptive
    and slow."""
    steps: int | None = None
    """Number of steps."""
    shift: float | None = None
    """Time shift; a smaller one puts more steps near the noise."""
    guidance: float | None = None
    """Guidance scale; 1 means no guidance."""
    guidance_start: float | None = None
    """Guide only where t >= this (0 = noise, 1 = data)."""
    guidance_end: float | None = None
    """Guide only where t <= this."""
    autoguidance: Path | None = None
    """A weaker generator of the same latents. It replaces the null class in the guidance."""
    batch_size: int = 32
    """Images per batch."""
    precision: Precision = "fp32"
    """Precision of the networks; the solver itself uses float32."""
    compile: bool = False
    """Compile the generators. It pays off for many images."""

    def config(self) -> SamplerConfig:
        """Return the preset, changed by the flags.

        Raises:
            FileNotFoundError: no such preset.
            ValueError: a value is out of range, or steps are given for a solver that chooses its own.
        """
        at_least_one(batch_size=self.batch_size)
        named = "/" in self.preset or Path(self.preset).is_file()
        preset = configs.load(SamplerConfig, self.preset if named else f"sampler/{self.preset}")
        guidance = ("guidance", "guidance_start", "guidance_end")
        flags = {
            name: value
            for name in ("solver", "steps", "shift", *guidance)
            if (value := getattr(self, name)) is not None
        }
        if flags.keys() & set(guidance):
            flags["tuned_on"] = None
        config = replace(preset, **flags)
        if config.solver == "rk45" and (given := flags.keys() & {"steps", "shift"}):
            raise ValueError(f"solver rk45 finds its own steps: leave --{' and --'.join(sorted(given))} out")
        return config


def load_models(tokenizer: Path, generator: Path, sampler: SamplerChoice, device: str) -> SamplingModels:
    """Load a tokenizer, its generator and, where given, the weaker generator of `sampler`."""
    from openpae.runtime.device import pick_device
    from openpae.sampling.pipeline import SamplingModels

    return SamplingModels.load(
        tokenizer,
        generator,
        sampler.autoguidance,
        device=pick_device(device),
        precision=sampler.precision,
        compile=sampler.compile,
    )
