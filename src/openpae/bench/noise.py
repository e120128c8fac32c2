"""Random data of the real shapes, for what is timed."""

from __future__ import annotations

from pathlib import Path

import torch

from openpae.data.shard_writer import ShardWriter
from openpae.data.shards import Layout, Shards


def random_latents(folder: Path, rows: int, shape: tuple[int, int, int], *, classes: int = 1) -> Shards:
    """A cache of random latents and mirror images, (2, C, h, w) a row, with labels taken in turn."""
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
        span = layout.span(shard)
        labels = [row % classes for row in span]
        writer.write(shard, torch.randn(len(span), 2, *shape, generator=generator), labels)
    return writer.finish()


def random_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Packed images of noise, uint8, of size (H, W)."""
    layout = Layout(
        kind="images",
        dtype="uint8",
        shape=(3, *size),
        sources=count,
        per_shard=count,
        attributes={"classes": ["noise"], "source": "random"},
    )
    writer = ShardWriter(folder, layout)
    generator = torch.Generator().manual_seed(0)
    writer.write(0, torch.randint(0, 256, (count, 3, *size), generator=generator), [0] * count)
    writer.finish()
