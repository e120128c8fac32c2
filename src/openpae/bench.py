"""What `pae bench` measures: how fast the parts are on this machine."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from openpae.data.order import StepBatches, loader
from openpae.data.shards import Layout, Shards, ShardWriter
from openpae.data.training import TrainingLatents


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
