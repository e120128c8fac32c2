"""How long does SSC take? Random latents of 16 x 16 tokens against crops of real label maps.

What the latents hold does not matter for the time: clustering costs the same for any.

    python benchmarks/ssc.py camvid-256 --count 5000 --ignore 11
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image

from openpae.geometry.metrics import spatial_structure_consistency


def main(
    masks: Annotated[Path, tyro.conf.Positional],
    count: int = 5000,
    ignore: int | None = None,
    size: int = 256,
    latent_dim: int = 32,
) -> None:
    """Time SSC and print it.

    Args:
        masks: index PNGs below folders named masks.
        count: images; from the second round of the maps on, each is a random crop of 3/4, enlarged.
        ignore: label that does not count.
        size: side of the label maps in pixels; 16 belong to a token.
        latent_dim: channels of the latents.
    """
    files = sorted(masks.rglob("masks/*.png"))
    if not files:
        raise FileNotFoundError(f"no index PNGs in folders named masks below {masks}")
    random, nearest = np.random.default_rng(0), Image.Resampling.NEAREST
    maps = np.empty((count, size, size), np.uint8)
    for i in range(count):
        with Image.open(files[i % len(files)]) as label:
            side = min(label.size) if i < len(files) else 3 * min(label.size) // 4
            left, top = (int(random.integers(0, whole - side + 1)) for whole in label.size)
            maps[i] = np.asarray(
                label.crop((left, top, left + side, top + side)).resize((size, size), nearest)
            )
    tokens = size // 16
    latents = torch.from_numpy(random.standard_normal((count, latent_dim, tokens, tokens), dtype=np.float32))
    wall, cpu = time.perf_counter(), time.process_time()
    found = spatial_structure_consistency(latents, torch.from_numpy(maps).long(), ignore=ignore)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{found}: {wall:.1f} s, {cpu:.1f} s of CPU time, {count:,} images of {tokens**2} tokens")


if __name__ == "__main__":
    tyro.cli(main)
