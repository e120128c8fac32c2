"""How long a step of the refiner takes, and how much of it is H_ref.

python benchmarks/refiner.py
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

from openpae import config as configs
from openpae.bench.noise import random_images
from openpae.bench.record import Measured, record
from openpae.engine.loop import seconds_per_step
from openpae.models.upsampling import reference_features
from openpae.train.refiner import RefinerTask
from openpae.train.settings import RefinerRun


def bench_refiner(*, preset: str = "refiner/quickstart", steps: int = 15) -> Measured:
    """Seconds per step of a refiner, and how much of it is H_ref; images are noise.

    Args:
        preset: whose sizes, upsampler and batch size.
        steps: timed steps; the median counts.

    Returns:
        step_seconds, images_per_second, reference_seconds (of one batch).
    """
    run = configs.load(RefinerRun, preset)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_images(folder / "images", 4 * run.loop.global_batch_size, run.image_shape)
        cache = None if run.data.feature_cache is None else folder / "features"
        data = dataclasses.replace(run.data, images=folder / "images", evaluation=None, feature_cache=cache)
        task = RefinerTask(dataclasses.replace(run, data=data))
        seconds = seconds_per_step(task, run.optim, run.loop, steps=steps)
        reference = _reference_seconds(task, steps)
    batch = run.loop.global_batch_size
    return Measured(
        figures={
            "step_seconds": seconds,
            "images_per_second": batch / seconds,
            "reference_seconds": reference,
        },
        settings={"preset": preset, "steps": steps, "batch_size": batch},
        device=task.device,
    )


@torch.no_grad()
def _reference_seconds(task: RefinerTask, steps: int) -> float:
    """Median time of H_ref of one global batch."""
    run, grid = task.run, task.run.model.grid_shape
    images = torch.rand(run.loop.global_batch_size, 3, *run.image_shape, device=task.device)
    features = task.features(images)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        reference_features(features, images, *grid, task.upsampler, run.low_pass)
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[steps // 2]


if __name__ == "__main__":
    print(json.dumps(record("refiner", bench_refiner()), indent=1))
