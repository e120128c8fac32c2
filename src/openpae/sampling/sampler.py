"""From noise to latents to images. Each sample has its own noise; decoding overlaps with sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from openpae.objective.flow import LAST_STEP, noisy_grid, time_grid
from openpae.runtime.draws import SampleNoise, _moved
from openpae.sampling.guidance import VelocityModel, check_labels, check_weak, guided_velocity
from openpae.sampling.settings import SamplerConfig
from openpae.sampling.solvers import (
    adams,
    after,
    euler,
    euler_maruyama,
    heun,
    multistep,
    runge_kutta,
    with_breaks,
)


class Decoder(Protocol):
    """What sampling needs of a tokenizer."""

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) around [0, 1] of latents (B, C, h, w)."""
        ...


def balanced_labels(count: int, num_classes: int | Sequence[int]) -> Tensor:
    """Labels 0, 1, ..., K - 1, 0, ...: every class gets count / K samples, up to one.

    Args:
        count: number of labels.
        num_classes: K; or the labels to take in turn, if some classes have no training image.

    Returns:
        (count,) int64.
    """
    if isinstance(num_classes, int):
        return torch.arange(count) % num_classes
    return torch.tensor(num_classes)[torch.arange(count) % len(num_classes)]


def evaluations(config: SamplerConfig) -> int | None:
    """Generator evaluations per sample (NFE): two at each guided position, one at the others.

    None for rk45, which chooses its own positions.
    """
    if config.solver == "rk45":
        return None
    grid: list[float] = _grid(config).tolist()
    visited = grid[:-1]
    if config.solver == "sde":
        visited = [*visited, 1 - LAST_STEP]
    elif config.solver == "heun":
        visited += grid[1:-1]
    elif config.solver == "adams":
        breaks = _breaks(config)
        restarts = [(t, t_next) for t, t_next in pairwise(grid) if t == 0 or t in breaks]
        visited = [after(t) if t in breaks else t for t in visited]
        visited += [(t + t_next) / 2 for t, t_next in restarts]
    return sum(1 + config.guides_at(t) for t in visited)


@torch.no_grad()
def sample_latents(
    model: VelocityModel,
    labels: Tensor,
    noise: Tensor | SampleNoise,
    config: SamplerConfig,
    *,
    weak: VelocityModel | None = None,
) -> Tensor:
    """Follow the velocity from noise to latents, in the tokenizer's scale.

    Args:
        model: the generator, in evaluation mode.
        labels: classes, (B,).
        noise: x_0, (B, C, h, w), or its source. Solver sde needs the source: it draws at every step.
        config: solver and guidance.
        weak: a smaller or less trained generator of the same latents. It guides in place of the null class
            (AutoGuidance).

    Returns:
        z, (B, C, h, w), in the scale of the tokenizer's decoder.

    Raises:
        ValueError: the generator does not know a label, the weak generator makes other latents or is never
            evaluated, or solver sde has no source of noise.
    """
    _check(model, labels, config, weak)
    return model.denormalise(_follow(model, labels, noise, config, weak))


def sample_batches(
    model: VelocityModel,
    labels: Tensor,
    config: SamplerConfig,
    batches: Iterable[Sequence[int]],
    *,
    seed: int = 0,
    weak: VelocityModel | None = None,
) -> Iterator[Tensor]:
    """Sample the latents with these indices, batch by batch. The host never waits for the device.

    Arguments and errors are those of `sample_images`.

    Yields:
        z, (B, C, h, w), on the generator's device.
    """
    _check(model, labels, config, weak)
    device, shape = next(model.parameters()).device, model.config.latent_shape
    for batch in batches:
        noise = SampleNoise(seed, batch, shape, device)
        chosen = _moved(labels[list(batch)], device)
        with torch.no_grad():
            z = model.denormalise(_follow(model, chosen, noise, config, weak))
        yield z


def sample_images(
    tokenizer: Decoder,
    generator: VelocityModel,
    labels: Tensor,
    config: SamplerConfig,
    *,
    seed: int = 0,
    batch_size: int = 32,
    batches: Iterable[Sequence[int]] | None = None,
    weak: VelocityModel | None = None,
) -> Iterator[Tensor]:
    """Sample images of these classes, batch by batch. A GPU decodes a batch while it samples the next.

    Args:
        tokenizer: decodes. The generator must have been trained on its latents.
        generator: makes the latents, in evaluation mode.
        labels: classes of all samples, (n,), on the CPU.
        config: solver and guidance.
        seed: sample i has its own noise from (seed, i).
        batch_size: samples per batch. It changes rounding only.
        batches: indices of the samples of each batch, in [0, n); None takes all in order, `batch_size` at a
            time.
        weak: see `sample_latents`.

    Yields:
        Images in [0, 1], (B, 3, H, W), on the CPU.

    Raises:
        ValueError: see `sample_latents`.
    """
    if batches is None:
        rows = range(len(labels))
        batches = (rows[start : start + batch_size] for start in range(0, len(labels), batch_size))
    return _decode_batches(
        tokenizer, sample_batches(generator, labels, config, batches, seed=seed, weak=weak)
    )


def _decode_batches(tokenizer: Decoder, latents: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decode each batch. A GPU decodes on a second stream while the first samples the next batch."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    side: torch.cuda.Stream | None = None
    for z in latents:
        if z.device.type != "cuda":
            yield _pixels(tokenizer, z)
            continue
        side = side or torch.cuda.Stream(z.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(z.device))  # that stream still samples z
        with torch.cuda.stream(side):
            images = _pixels(tokenizer, z)
            host = torch.empty_like(images, device="cpu", pin_memory=True)
            host.copy_(images, non_blocking=True)
            done = side.record_event()
        z.record_stream(side)  # the allocator must not reuse its memory before the decode has read it
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = host, done
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0]


def _check(model: VelocityModel, labels: Tensor, config: SamplerConfig, weak: VelocityModel | None) -> None:
    check_labels(model, labels)
    if weak is None:
        return
    if config.guidance == 1:
        raise ValueError("a weak generator guides only where guidance is not 1; leave it out or set guidance")
    check_weak(model, weak)


def _follow(
    model: VelocityModel,
    labels: Tensor,
    noise: Tensor | SampleNoise,
    config: SamplerConfig,
    weak: VelocityModel | None,
) -> Tensor:
    """From noise to data, in the generator's scale."""
    x_0 = (noise.draw() if isinstance(noise, SampleNoise) else noise).float()
    if config.solver == "rk45":
        # One by one: step sizes must not depend on the other samples of the batch.
        rows = [slice(row, row + 1) for row in range(len(x_0))]
        return torch.cat([_adaptive(model, labels[row], x_0[row], config, weak) for row in rows])
    velocity = guided_velocity(model, labels, config.guidance, config.guides_at, weak)
    if config.solver == "sde":
        if not isinstance(noise, SampleNoise):
            raise ValueError(
                "solver sde needs noise at every step: give it a SampleNoise, not the initial noise alone"
            )
        return euler_maruyama(velocity, x_0, _grid(config), noise.draw)
    if config.solver == "adams":
        return adams(velocity, x_0, _grid(config), _breaks(config))
    solve = {"euler": euler, "heun": heun, "multistep": multistep}[config.solver]
    return solve(velocity, x_0, _grid(config))


def _adaptive(
    model: VelocityModel, label: Tensor, x: Tensor, config: SamplerConfig, weak: VelocityModel | None
) -> Tensor:
    """RK45 in up to three parts: the velocity jumps where guidance starts or ends."""
    for start, stop in pairwise(sorted({0.0, 1.0, *_breaks(config)})):
        guided = config.guides_at((start + stop) / 2)
        velocity = guided_velocity(model, label, config.guidance, _constant(guided), weak)
        x = runge_kutta(velocity, x, start, stop, config.tolerance)
    return x


def _constant(guided: bool) -> Callable[[float], bool]:
    return lambda t: guided


def _grid(config: SamplerConfig) -> Tensor:
    grid = (noisy_grid if config.solver == "sde" else time_grid)(config.steps + 1, config.shift)
    return with_breaks(grid, _breaks(config)) if config.solver == "adams" else grid


def _breaks(config: SamplerConfig) -> tuple[float, ...]:
    """Inner positions where guidance starts or ends, and the velocity jumps."""
    ends = () if config.guidance == 1 else (config.guidance_start, config.guidance_end)
    return tuple(t for t in ends if 0 < t < 1)


def _pixels(tokenizer: Decoder, z: Tensor) -> Tensor:
    with torch.no_grad():
        return tokenizer.decode(z).clamp(0, 1).float()
