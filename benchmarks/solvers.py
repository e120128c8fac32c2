"""How far from the path do few steps end? Every solver against RK45, on a trained generator.

Prints the root mean square error of the latents, per channel normalised, at equal numbers of steps (Heun: of
evaluations). Beside the solvers of openpae stand two other second-order multisteps, which draw their line for
the data D = x + (1 - t) v as DPM-Solver++(2M) does: over t, and over the log signal-to-noise ratio.

    python benchmarks/solvers.py runs/quickstart/generator --guidance 2 --guidance-start 0.1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from torch import Tensor

from openpae import config as configs
from openpae.models.saved import load_generator
from openpae.objective.flow import time_grid
from openpae.runtime.draws import initial_noise
from openpae.sampling.guidance import guided_velocity
from openpae.sampling.sampler import balanced_labels, evaluations, sample_latents
from openpae.sampling.settings import SamplerConfig
from openpae.sampling.solvers import Field, euler, heun, multistep

Solver = Callable[[Field, Tensor, Tensor], Tensor]


def data_over_t(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """A line for D over t: dx/dt = (D - x) / (1 - t) integrated exactly.

    x_t = x_s + (t-s) v_s + (D_s - D_p) / (s-p) [(t-s) - (1-t) log((1-s)/(1-t))]
    """
    before: tuple[float, Tensor] | None = None
    for now, then in pairwise(times.tolist()):
        v = velocity(x, now)
        data = x + (1 - now) * v
        x = x + (then - now) * v
        if before is not None:
            left = max(0.0, 1 - then)
            bend = (then - now) - (left * math.log((1 - now) / left) if left else 0.0)
            x = x + bend / (now - before[0]) * (data - before[1])
        before = (now, data)
    return x


def data_over_ratio(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """DPM-Solver++(2M), a line for D over l = log(t / (1 - t)); first order where l is infinite.

    x_t = (1-t)/(1-s) x_s - t (e^-h - 1) [(1 + 1/2r) D_s - 1/2r D_p],   h = l_t - l_s,   r = (l_s - l_p) / h
    """
    before: tuple[float, Tensor] | None = None
    for now, then in pairwise(times.tolist()):
        v = velocity(x, now)
        data = x + (1 - now) * v
        if before is None or before[0] == 0 or 1 - then < 1e-9:
            x = x + (then - now) * v
        else:
            last, here, there = (math.log(t / (1 - t)) for t in (before[0], now, then))
            h = there - here
            bend = h / (here - last) / 2
            line = (1 + bend) * data - bend * before[1]
            x = (1 - then) / (1 - now) * x - then * math.expm1(-h) * line
        before = (now, data)
    return x


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "multistep": multistep,
    "data over t": data_over_t,
    "data over the ratio": data_over_ratio,
}


@torch.no_grad()
def main(
    generator: Path,
    /,
    guidance: float = 1.0,
    guidance_start: float = 0.0,
    shift: float = 0.4,
    steps: tuple[int, ...] = (10, 15, 25, 45, 100, 249),
    count: int = 18,
    tolerance: float = 1e-5,
    presets: bool = False,
) -> None:
    """Print a table of errors.

    Args:
        generator: a generator folder or a run folder.
        guidance: strength of classifier-free guidance.
        guidance_start: guide where t >= this.
        shift: of the time grid.
        steps: columns of the table.
        count: samples, of all classes in turn.
        tolerance: of the reference.
        presets: compare the presets, with this guidance, in place of the solvers.
    """
    model = load_generator(generator)
    labels = balanced_labels(count, model.config.num_classes)
    noise = initial_noise(0, range(count), model.config.latent_shape)
    settings = {"guidance": guidance, "guidance_start": guidance_start}
    exact = SamplerConfig(solver="rk45", tolerance=tolerance, **settings)
    reference = model.normalise(sample_latents(model, labels, noise, exact))
    if presets:
        for name in ("official-250", "fast-45", "fast-28", "few-15"):
            config = configs.changed(configs.load(SamplerConfig, f"sampler/{name}"), settings)
            error = model.normalise(sample_latents(model, labels, noise, config)) - reference
            print(f"| {name} | {evaluations(config)} | {error.square().mean().sqrt():.4f} |", flush=True)
        return
    velocity = guided_velocity(model, labels, guidance, exact.guides_at)
    print("| solver | " + " | ".join(map(str, steps)) + " |\n|---" + "|---" * len(steps) + "|")
    for name, solve in SOLVERS.items():
        cells = []
        for number in steps:
            points = (number + 1) // 2 + 1 if name == "heun" else number + 1
            error = solve(velocity, noise, time_grid(points, shift)) - reference
            cells.append(f"{error.square().mean().sqrt():.4f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    cells = []
    for number in steps:  # from the sampler, which knows where guidance starts and ends
        config = SamplerConfig(solver="adams", steps=number, shift=shift, **settings)
        error = model.normalise(sample_latents(model, labels, noise, config)) - reference
        cells.append(f"{error.square().mean().sqrt():.4f}")
    print("| adams | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
