"""Images per second of training and of sampling."""

from __future__ import annotations

import time
from typing import Any

import torch

from openpae import config as configs
from openpae.bench.generator import count, utilisation
from openpae.engine.loop import seconds_per_step
from openpae.models.ditdh import build_generator
from openpae.models.tokenizer import tokenizer_class
from openpae.plan.fakes import Run
from openpae.plan.trial import planned_run
from openpae.runtime.device import autocast
from openpae.sampling.sampler import balanced_labels, evaluations, sample_batches, sample_images
from openpae.sampling.settings import SamplerConfig
from tests.gpu.outcome import NotRun, Outcome
from tests.gpu.precision import relative_error, shake
from tests.gpu.tasks import images_of, peak_figures, planned, preset, real_task, wait

ALL_LOSSES: dict[str, Any] = {
    "prior": "no-refiner",
    "loss.gan": 0.5,
    "loss.discriminator": {"kind": "patch", "width": 4, "num_layers": 2},
    "loss.ssr": 0.2,
    "loss.mcr": 0.5,
    "loss.scr": 1.0,
}
"""Changes of the tiny tokenizer that switch on every loss of the paper."""
STREAMS = 0.05
"""Bound of the relative difference of images from one stream and from two. A library may choose other kernels
for another stream, which changes the rounding. A race would change the images."""


def generator_speed(device: torch.device, *, compiled: bool) -> Outcome:
    """Measure the training speed of XL/1 at the device batch that is planned for this GPU; tiny on a CPU.

    Raises:
        NotRun: compiled, on a CPU.
    """
    on_gpu = device.type == "cuda"
    if compiled and not on_gpu:
        raise NotRun("needs CUDA")
    run = planned("generator/xl-80ep")[0] if on_gpu else preset("generator/tiny")
    run = planned_run(run, device=device.type, compile=compiled)
    try:
        figures = _training_figures(run, device)
    finally:
        if compiled:
            torch._dynamo.reset()  # compiled graphs hold the weights
    flops = count(run.model)["train_flops"]  # type: ignore[arg-type]
    work = {"train_images_per_second": figures["images/s"], "train_flops": flops}
    figures["utilisation"] = utilisation(work, device, run.loop.precision)
    return Outcome(figures)


def tokenizer_speed(device: torch.device) -> Outcome:
    """Measure the training speed of the paper's tokenizer with all losses, at the planned device batch."""
    on_gpu = device.type == "cuda"
    run = (
        planned("tokenizer/dinov2-l-d32")[0]
        if on_gpu
        else configs.changed(preset("tokenizer/tiny"), ALL_LOSSES)
    )
    changes = {"loss.gan_start": 0.0, "loss.discriminator_start": 0.0}
    return Outcome(_training_figures(planned_run(configs.changed(run, changes), device=device.type), device))


def _training_figures(run: Run, device: torch.device) -> dict[str, Any]:
    steps = 8 if device.type == "cuda" else 1
    with real_task(run, device) as task:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = seconds_per_step(task, run.optim, run.loop, steps=steps)
    figures = {
        "device batch": run.loop.device_batch_size or run.loop.global_batch_size,
        "images/s": images_of(run) / seconds,
    }
    return figures | peak_figures(device)


def sampling(device: torch.device) -> Outcome:
    """Sample and decode images by the preset fast-45, and compare them with latents decoded one by one."""
    on_gpu = device.type == "cuda"
    tokenizer_run: Any = preset("tokenizer/dinov2-l-d32" if on_gpu else "tokenizer/tiny")
    generator_run: Any = preset("generator/xl-80ep" if on_gpu else "generator/tiny")
    config = configs.load(SamplerConfig, "sampler/fast-45")
    batch = 64 if on_gpu else 2
    torch.manual_seed(0)
    with torch.device(device):
        tokenizer = tokenizer_class(tokenizer_run.model)(tokenizer_run.model).to(device).eval()
        generator = build_generator(generator_run.model).to(device).eval()
    shake(generator)
    shake(tokenizer)
    labels = balanced_labels(2 * batch, generator_run.model.num_classes)
    rows = [range(batch), range(batch, 2 * batch)]
    with autocast(device, "bf16"):
        for _ in sample_images(tokenizer, generator, labels, configs.changed(config, {"steps": 1})):
            pass  # what is set up once is set up
        wait(device)
        start = time.perf_counter()
        images = list(sample_images(tokenizer, generator, labels, config, batches=rows))
        seconds = time.perf_counter() - start
        with torch.no_grad():
            alone = [
                tokenizer.decode(z).clamp(0, 1).float().cpu()
                for z in sample_batches(generator, labels, config, rows)
            ]
    error = relative_error(torch.cat(images), torch.cat(alone))
    figures = {
        "batch": batch,
        "steps": config.steps,
        "evaluations": evaluations(config),
        "images/s": 2 * batch / seconds,
        "error beside one stream": error,
    }
    problems = [] if all(bool(part.isfinite().all()) for part in images) else ["an image is not finite"]
    if not error < STREAMS:
        problems.append(f"images decoded beside sampling differ by {error:.2g} from those decoded after it")
    return Outcome(figures | peak_figures(device), problems)
