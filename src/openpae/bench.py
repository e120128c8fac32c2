"""What `pae bench` measures: how fast the parts are on this machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpae import config as configs
from openpae.checkpoint import encoder_fingerprint, write_prior
from openpae.data.order import StepBatches, loader
from openpae.data.shards import Layout, Shards, ShardWriter
from openpae.data.training import TrainingLatents
from openpae.encoders import load_encoder
from openpae.priors import Refiner
from openpae.storage import whole_folder
from openpae.train.engine import seconds_per_step
from openpae.train.refiner import RefinerRun
from openpae.train.tokenizer import TokenizerRun, TokenizerTask


def bench_loader(
    *,
    rows: int = 8192,
    shape: tuple[int, int, int] = (32, 16, 16),
    batch_size: int = 1024,
    seconds: float = 5.0,
) -> dict[str, float]:
    """Latents per second that one core reads from a warm cache in training order, mirrored or not by chance.

    Args:
        rows: images in the cache; their latents and mirror images are random numbers.
        shape: (C, h, w) in bfloat16.
        batch_size: latents per batch.
        seconds: how long to measure, after one warm pass.

    Returns:
        latents_per_second, gigabytes_per_second.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            latents = TrainingLatents(_random_latents(Path(folder) / "latents", rows, shape), seed=0)
            steps = range(10**6)
            batches = iter(
                loader(latents, StepBatches(steps, batch_size, batch_size), num_workers=0, pin=False)
            )
            for _ in range(-(-2 * rows // batch_size)):
                next(batches)
            seen, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds:
                seen += len(next(batches).latents)
    finally:
        torch.set_num_threads(threads)
    rate = seen / passed
    return {"latents_per_second": rate, "gigabytes_per_second": rate * 2 * float(np.prod(shape)) / 1e9}


def bench_tokenizer(*, steps: int = 15) -> dict[str, float]:
    """Seconds per step of the quickstart's tokenizer: L1 + LPIPS alone against its full objective.

    Images are noise, the refiner is untrained: neither changes what a step costs. Features and targets are
    cached, as in the quickstart; the discriminator takes part from the first step.

    Args:
        steps: timed steps of each; the median counts.

    Returns:
        baseline_seconds, full_seconds, ratio.
    """
    run = configs.load(TokenizerRun, "tokenizer/quickstart")
    off: dict[str, Any] = {"gan": 0.0, "ssr": 0.0, "mcr": 0.0, "scr": 0.0}
    full: dict[str, Any] = {"discriminator_start": 0.0, "gan_start": 0.0}
    encoder = load_encoder(run.model.encoder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _random_images(folder / "images", 4 * run.loop.global_batch_size, run.model.image_size)
        refiner = configs.load(RefinerRun, "refiner/quickstart").model
        with whole_folder(folder / "refiner") as partial:
            write_prior(partial, Refiner(refiner).state_dict(), refiner, encoder_fingerprint(encoder))
        data = dataclasses.replace(
            run.data, images=folder / "images", evaluation=None, feature_cache=folder / "features"
        )
        seconds = []
        for weights, prior in ((off, None), (full, folder / "refiner")):
            loss = dataclasses.replace(run.loss, **weights)
            variant = dataclasses.replace(run, prior=prior, data=data, loss=loss)
            task = TokenizerTask(variant, encoder)
            seconds.append(seconds_per_step(task, run.optim, run.loop, steps=steps))
    return {"baseline_seconds": seconds[0], "full_seconds": seconds[1], "ratio": seconds[1] / seconds[0]}


def bench_metrics(
    *, samples: int = 50_000, features: int = 2048, block: int = 250
) -> dict[str, float | None]:
    """Time and memory of the Frechet distance between two sets of features that are at hand.

    Args:
        samples: N of each set; features are made block by block and not timed.
        features: F.
        block: rows per block, as they would come from an extractor.

    Returns:
        statistics_seconds (of both sets), distance_seconds, peak_gib (of the process, with torch in it); and
        beside them torch_fidelity_seconds, torch_fidelity_peak_gib and relative_difference, None where
        torch-fidelity is not installed.
    """
    from openpae.eval.frechet import Moments, frechet_distance

    gaussians, statistics = [], 0.0
    for seed in (0, 1):
        moments = Moments()
        for rows in _random_features(seed, samples, features, block):
            start = time.perf_counter()
            moments.update(rows)
            statistics += time.perf_counter() - start
        start = time.perf_counter()
        gaussians.append(moments.gaussian())
        statistics += time.perf_counter() - start
    start = time.perf_counter()
    distance = frechet_distance(*gaussians)
    result: dict[str, float | None] = {
        "statistics_seconds": statistics,
        "distance_seconds": time.perf_counter() - start,
        "peak_gib": _peak_gib(),
        "torch_fidelity_seconds": None,
        "torch_fidelity_peak_gib": None,
        "relative_difference": None,
    }
    if importlib.util.find_spec("torch_fidelity") is not None:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        theirs, seconds = [], 0.0
        for seed in (0, 1):
            x = torch.cat(list(_random_features(seed, samples, features, block)))
            start = time.perf_counter()
            theirs.append(fid_features_to_statistics(x))
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        value = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
        result["torch_fidelity_seconds"] = seconds + time.perf_counter() - start
        result["torch_fidelity_peak_gib"] = _peak_gib()
        result["relative_difference"] = abs(distance - float(value)) / float(value)
    return result


def _random_features(seed: int, samples: int, features: int, block: int) -> Iterator[Tensor]:
    """Rows as an extractor might give them: not negative, with the mean of the sets apart."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, samples, block):
        rows = torch.randn(min(block, samples - start), features, generator=generator)
        yield rows.abs_() + 0.01 * seed


def _peak_gib() -> float:
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _random_latents(folder: Path, rows: int, shape: tuple[int, int, int]) -> Shards:
    layout = Layout(
        kind="latents",
        dtype="bfloat16",
        shape=(2, *shape),
        sources=rows,
        per_shard=1024,
        attributes={"tokenizer": "random"},
    )
    writer = ShardWriter(folder, layout)
    generator = torch.Generator().manual_seed(0)
    for shard in writer.missing():
        count = len(layout.span(shard))
        writer.write(shard, torch.randn(count, 2, *shape, generator=generator), [0] * count)
    return writer.finish()


def _random_images(folder: Path, count: int, size: int) -> None:
    layout = Layout(
        kind="images",
        dtype="uint8",
        shape=(3, size, size),
        sources=count,
        per_shard=count,
        attributes={"classes": ["noise"], "source": "random"},
    )
    writer = ShardWriter(folder, layout)
    generator = torch.Generator().manual_seed(0)
    writer.write(0, torch.randint(0, 256, (count, 3, size, size), generator=generator), [0] * count)
    writer.finish()
