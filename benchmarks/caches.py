"""How fast one core reads latents in training order, and how fast caches are written.

python benchmarks/caches.py loader|cache
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openpae import config as configs
from openpae.bench.noise import random_images, random_latents
from openpae.bench.record import Measured, record
from openpae.data.caches import cache_features, cache_latents
from openpae.data.images import PackedImages
from openpae.data.training import TrainingLatents
from openpae.models.tokenizer import PAE, build_tokenizer
from openpae.runtime.device import autocast, pick_device
from openpae.train.settings import TokenizerRun


def bench_loader(
    *,
    rows: int = 8192,
    shape: tuple[int, int, int] = (32, 16, 16),
    batch_size: int = 1024,
    seconds: float = 5.0,
) -> Measured:
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
            latents = TrainingLatents(random_latents(Path(folder) / "latents", rows, shape), seed=0)
            batches = (
                latents.__getitems__(list(range(start, start + batch_size)))
                for start in itertools.count(0, batch_size)
            )
            for _ in range(-(-2 * rows // batch_size)):
                next(batches)
            seen, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds:
                seen += len(next(batches).latents)
    finally:
        torch.set_num_threads(threads)
    rate = seen / passed
    return Measured(
        figures={"latents_per_second": rate, "gigabytes_per_second": rate * 2 * float(np.prod(shape)) / 1e9},
        settings={"rows": rows, "shape": list(shape), "batch_size": batch_size, "threads": 1},
    )


def bench_cache(
    *,
    preset: str = "tokenizer/quickstart",
    images: int = 256,
    batch_size: int = 64,
    precision: str = "bf16",
) -> Measured:
    """Images per second into the caches of latents and of features, from packed images to synced shards.

    Images are noise and the tokenizer is new: neither changes what they cost.

    Args:
        preset: whose tokenizer.
        images: how many; every one is encoded twice, with its mirror image.
        batch_size: per forward pass.
        precision: of the latents' pass, as in the command; features are computed in float32, as in training.

    Returns:
        latents_images_per_second, features_images_per_second.
    """
    config = configs.load(TokenizerRun, preset).model
    model = build_tokenizer(config).eval().to(pick_device("auto"))
    with tempfile.TemporaryDirectory() as name:
        latents, features = _cache_seconds(model, Path(name), images, batch_size, precision)
    return Measured(
        figures={
            "latents_images_per_second": images / latents,
            "features_images_per_second": images / features,
        },
        settings={"preset": preset, "images": images, "batch_size": batch_size, "precision": precision},
        device=model.device,
    )


def _cache_seconds(
    model: PAE, folder: Path, images: int, batch_size: int, precision: str
) -> tuple[float, float]:
    """Time to cache the latents and the features of so many images, after one batch to warm up."""
    config, device = model.config, model.device

    def encode(x: Tensor) -> Tensor:
        with autocast(device, precision):
            return model.encode(x)

    random_images(folder / "images", images, config.image_shape)
    source = PackedImages(folder / "images")
    with torch.no_grad():
        x = torch.rand(batch_size, 3, *config.image_shape, device=device)
        encode(x)
        model.features(x)
    start = time.perf_counter()
    cache_latents(
        encode,
        source,
        folder / "latents",
        image_size=config.image_shape,
        latent_shape=config.latent_shape,
        tokenizer_fingerprint="bench",
        precision=precision,
        batch_size=batch_size,
        device=device,
    )
    between = time.perf_counter()
    cache_features(
        model.features,
        source,
        folder / "features",
        image_size=config.image_shape,
        shape=(math.prod(config.grid_shape), model.spec.dim),
        encoder_fingerprint="bench",
        flips=True,
        batch_size=batch_size,
        device=device,
    )
    return between - start, time.perf_counter() - between


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("loader", "cache"))
    what = parser.parse_args().what
    print(json.dumps(record(what, bench_loader() if what == "loader" else bench_cache()), indent=1))
