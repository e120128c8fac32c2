"""Cost of the generators: parameters, operations, memory, speed of training and sampling."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from openpae.bench.noise import random_latents
from openpae.bench.record import Measured
from openpae.engine.loop import seconds_per_step
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import SIZES, DiTDHConfig, GeneratorConfig, LightningDiTConfig
from openpae.models.ditdh import build_generator
from openpae.models.generator import LatentGenerator
from openpae.runtime.cards import card_of
from openpae.runtime.device import autocast, device_name, peak_gib, pick_device
from openpae.runtime.draws import initial_noise
from openpae.sampling.sampler import evaluations, sample_latents
from openpae.sampling.settings import SamplerConfig
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun

Size = Literal["s", "b", "l", "xl", "1p0b", "1p6b"]


def bench_generator(
    *,
    sizes: Sequence[Size] | None = None,
    patch_size: int = 1,
    batch_size: int | None = None,
    steps: int = 8,
    sample_steps: int = 45,
    precision: Literal["fp32", "bf16"] = "bf16",
    compile: bool = False,
    checkpoint_blocks: int = 0,
) -> Measured:
    """Count parameters and operations of every size of LightningDiT, and time the chosen sizes.

    Args:
        sizes: sizes to time; None takes all on a GPU and none on a CPU.
        patch_size: latent cells per token and axis.
        batch_size: images per step; None takes 256 on a GPU, halved until it fits, and 2 on a CPU.
        steps: timed training steps; the median counts.
        sample_steps: Euler steps of the timed samples, guided from t = 0.25 on; they are not decoded.
        precision: as loop.precision.
        compile: as loop.compile.
        checkpoint_blocks: as in the run's config.

    Returns:
        For every size: parameters, forward_flops and train_flops per image. For timed sizes also batch_size,
        train_images_per_second, model_flops_utilisation (None if the device's peak is unknown),
        peak_memory_gib of training (on a CPU: of the process so far) and sample_images_per_second.
    """
    device = pick_device("auto")
    chosen = sizes if sizes is not None else (tuple(SIZES) if device.type == "cuda" else ())
    batches = [batch_size] if batch_size else [256, 128, 64, 32, 16, 8] if device.type == "cuda" else [2]
    sampler = SamplerConfig(steps=sample_steps)
    loop = LoopConfig(
        steps=steps + 2, global_batch_size=batches[0], precision=precision, compile=compile, ema_decay=0.9999
    )
    figures: dict[str, dict[str, float | None]] = {}
    for size in SIZES:
        config = LightningDiTConfig.of_size(size, patch_size=patch_size)
        figures[size] = {**count(config), **dict.fromkeys(_MEASURED)}
        if size in chosen:
            run = GeneratorRun(
                model=config,
                checkpoint_blocks=checkpoint_blocks,
                latents=Path(),
                optim=OptimConfig(lr=1e-4),
                loop=loop,
            )
            figures[size] |= _first_that_fits(run, batches, steps, sampler)
            figures[size]["model_flops_utilisation"] = utilisation(figures[size], device, precision)
    settings = {
        "patch_size": patch_size,
        "precision": precision,
        "compile": compile,
        "checkpoint_blocks": checkpoint_blocks,
        "sample_steps": sample_steps,
        "sample_evaluations": evaluations(sampler),
    }
    return Measured(figures=figures, settings=settings, device=device)


_MEASURED = (
    *("batch_size", "train_images_per_second", "model_flops_utilisation"),
    *("peak_memory_gib", "sample_images_per_second"),
)


def count(config: GeneratorConfig) -> dict[str, float | None]:
    """Return parameters, and operations per image of a forward pass and of a training step.

    A multiplication and an addition are two operations. Norms, activations and the like are left out, as
    usual. The backward pass has twice the operations of the forward pass. Recomputation in checkpointed
    blocks does not count.
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_generator(config).parameters())
    forward = forward_flops(config)
    return {"parameters": parameters, "forward_flops": forward, "train_flops": 3 * forward}


def forward_flops(config: GeneratorConfig) -> int:
    """Return the operations of a forward pass of one image: 2 n a b per layer, n tokens from width a to b."""
    tokens = math.prod(config.token_grid)
    dim, channels = config.hidden_dim, config.latent_dim * config.patch_size**2
    if not isinstance(config, DiTDHConfig):
        ends = 2 * tokens * channels * dim + 2 * (256 * dim + dim * dim)
        final = 2 * dim * 2 * dim + 2 * tokens * dim * channels
        return ends + config.num_layers * _block_flops(dim, tokens, conditions=1) + final
    wide, head = config.head.hidden_dim, config.head
    ends = 2 * tokens * channels * (dim + wide) + 2 * (512 * dim + dim * dim) + 2 * tokens * dim * wide
    blocks = config.num_layers * _block_flops(dim, tokens, conditions=1)
    blocks += head.num_layers * _block_flops(wide, tokens, conditions=tokens)
    return ends + blocks + 2 * tokens * wide * 2 * wide + 2 * tokens * wide * channels


def _block_flops(dim: int, tokens: int, *, conditions: int) -> int:
    hidden = int(2 / 3 * 4 * dim)
    attention = 2 * tokens * dim * 3 * dim + 2 * 2 * tokens * tokens * dim + 2 * tokens * dim * dim
    mlp = 2 * tokens * dim * 2 * hidden + 2 * tokens * hidden * dim
    return attention + mlp + 2 * conditions * dim * 6 * dim


def utilisation(figures: Mapping[str, float | None], device: torch.device, precision: str) -> float | None:
    """Return the share of a device's peak operations per second that training reaches; None if unknown."""
    peak = device_peak(device_name(device)) if precision == "bf16" else None
    rate, work = figures["train_images_per_second"], figures["train_flops"]
    return None if peak is None or rate is None or work is None else rate * work / peak


def device_peak(name: str) -> float | None:
    """Return the dense bfloat16 operations per second of a device; None if it is not in the table."""
    card = card_of(name)
    return None if card is None else card.half


def _first_that_fits(
    run: GeneratorRun, batches: Sequence[int], steps: int, sampler: SamplerConfig
) -> dict[str, float]:
    for number, batch in enumerate(batches):
        try:
            sized = dataclasses.replace(run, loop=dataclasses.replace(run.loop, global_batch_size=batch))
            return _measured(sized, steps, sampler)
        except torch.cuda.OutOfMemoryError:
            if number + 1 == len(batches):
                raise
            torch.cuda.empty_cache()
    raise AssertionError("unreachable: the last batch size returns or raises")


def _measured(run: GeneratorRun, steps: int, sampler: SamplerConfig) -> dict[str, float]:
    batch = run.loop.global_batch_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "latents"
        random_latents(folder, 2 * batch, run.model.latent_shape, classes=run.model.num_classes)
        task = GeneratorTask(dataclasses.replace(run, latents=folder))
        if task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_per_step(task, run.optim, run.loop, steps=steps)
        peak = peak_gib(task.device)
    del task.optimizers  # frees memory for sampling
    return {
        "batch_size": batch,
        "train_images_per_second": batch / seconds,
        "peak_memory_gib": peak,
        "sample_images_per_second": batch / _sample_seconds(task.model, batch, sampler, run.loop.precision),
    }


def _sample_seconds(model: LatentGenerator, batch: int, sampler: SamplerConfig, precision: str) -> float:
    """Return the seconds to sample a batch of latents, after a warm-up step."""
    device = model.latent_mean.device
    labels = torch.arange(batch, device=device) % model.config.num_classes
    noise = initial_noise(0, range(batch), model.config.latent_shape).to(device)
    model.eval()
    start = 0.0
    for config in (dataclasses.replace(sampler, steps=1), sampler):
        start = time.perf_counter()
        with autocast(device, precision):
            sample_latents(model, labels, noise, config)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start
