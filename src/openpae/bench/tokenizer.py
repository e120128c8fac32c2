"""How long a training step of the tokenizer takes."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from openpae import config as configs
from openpae.bench.noise import random_images
from openpae.bench.record import Found
from openpae.engine.loop import seconds_per_step
from openpae.models.encoders import encoder_fingerprint, load_encoder
from openpae.models.priors import Refiner
from openpae.models.saved import write_prior
from openpae.storage.files import atomic_folder
from openpae.train.settings import RefinerRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask


def bench_tokenizer(*, preset: str = "tokenizer/quickstart", steps: int = 15) -> Found:
    """Seconds per step of a tokenizer: L1 + LPIPS alone against the full objective.

    Images are noise, the refiner is new: neither changes what a step costs. Features and targets are cached
    where the preset caches them; the discriminator takes part from the first step.

    Args:
        preset: whose sizes and batch size; its weights of 0 stay 0.
        steps: timed steps of each; the median counts.

    Returns:
        baseline_seconds, full_seconds, ratio, images_per_second (of the full objective).
    """
    run = configs.load(TokenizerRun, preset)
    off: dict[str, Any] = {"gan": 0.0, "ssr": 0.0, "mcr": 0.0, "scr": 0.0}
    full: dict[str, Any] = {"discriminator_start": 0.0, "gan_start": 0.0}
    encoder = load_encoder(run.model.encoder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_images(folder / "images", 4 * run.loop.global_batch_size, run.model.image_shape)
        refiner = configs.load(RefinerRun, preset.replace("tokenizer/", "refiner/")).model
        with atomic_folder(folder / "refiner") as partial:
            write_prior(partial, Refiner(refiner).state_dict(), refiner, encoder_fingerprint(encoder))
        cache = None if run.data.feature_cache is None else folder / "features"
        data = dataclasses.replace(run.data, images=folder / "images", evaluation=None, feature_cache=cache)
        seconds = []
        for weights, prior in ((off, None), (full, folder / "refiner")):
            loss = dataclasses.replace(run.loss, **weights)
            variant = dataclasses.replace(run, prior=prior, data=data, loss=loss)
            task = TokenizerTask(variant, encoder)
            seconds.append(seconds_per_step(task, run.optim, run.loop, steps=steps))
    return Found(
        figures={
            "baseline_seconds": seconds[0],
            "full_seconds": seconds[1],
            "ratio": seconds[1] / seconds[0],
            "images_per_second": run.loop.global_batch_size / seconds[1],
        },
        settings={"preset": preset, "steps": steps, "batch_size": run.loop.global_batch_size},
        device=task.device,
    )
