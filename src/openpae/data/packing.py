"""Decode image files in batches, or pack them into shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae.data.crops import Size, center_crop, height_width
from openpae.data.decode import BrokenImage
from openpae.data.images import ImageSource, PackedImages
from openpae.data.shard_writer import Part, write_shards
from openpae.data.shards import Layout
from openpae.runtime import processes

R = TypeVar("R")
T = TypeVar("T")


def pack_images(
    source: ImageSource,
    folder: Path,
    *,
    size: Size,
    skip_broken: bool = False,
    per_shard: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> PackedImages:
    """Decode and centre-crop images once, so that training reads them from a memory map.

    Under torchrun every process must call it, and each decodes some of the shards.

    Args:
        source: the images.
        folder: output folder. An interrupted call resumes.
        size: (H, W) of the packed images, or the side of a square.
        skip_broken: leave out files that cannot be decoded, and list them in index.json.
        per_shard: images per shard.
        progress: called with (done, total) images.

    Raises:
        BrokenImage: a file cannot be decoded and skip_broken is off.
        ValueError: the folder holds something else.
    """
    layout = Layout(
        kind="images",
        dtype="uint8",
        shape=(3, *height_width(size)),
        sources=len(source),
        per_shard=per_shard,
        attributes={"classes": source.classes, "source": source.fingerprint()},
    )

    def read(index: int) -> NDArray[np.uint8] | str:
        try:
            return center_crop(source.read(index), size)
        except BrokenImage as error:
            if not skip_broken:
                raise BrokenImage(f"{error}; remove the file, or pass --skip-broken") from None
            return str(error)

    def parts(span: range) -> Iterator[Part]:
        for index, result in zip(span, in_order(pool, read, span), strict=True):
            if isinstance(result, str):
                yield Part(rows=torch.empty(0, *layout.shape), labels=[], skipped=[result])
            else:
                yield Part(rows=torch.from_numpy(result)[None], labels=[int(source.labels[index])])
            if progress:
                progress(index + 1, len(source))

    with ThreadPoolExecutor(max_workers=processes.own_cores()) as pool:
        write_shards(folder, layout, parts)
    return PackedImages(folder)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int = 64
) -> Iterator[R]:
    """Like `pool.map`, with at most `ahead` results waiting: decoded images may not fit in memory."""
    remaining = iter(items)
    pending: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(remaining, ahead))
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(function, item) for item in islice(remaining, 1))


def decode_batch(
    source: ImageSource, indices: Sequence[int], size: Size, skip_broken: bool = False
) -> tuple[Tensor, list[int], list[str]]:
    """Centre-cropped images at some indices.

    Args:
        source: the images. Packed images of this size are copied without decoding.
        indices: indices into the source.
        size: (H, W), or the side of a square.
        skip_broken: leave out files that cannot be decoded.

    Returns:
        uint8 images (B, 3, H, W), their indices, and an error message for each image left out.

    Raises:
        BrokenImage: a file cannot be decoded and skip_broken is off.
    """
    if isinstance(source, PackedImages) and source.image_shape == height_width(size):
        return source.shards.gather(np.asarray(indices, dtype=np.int64)), list(indices), []
    images = torch.empty(len(indices), 3, *height_width(size), dtype=torch.uint8)
    kept: list[int] = []
    broken: list[str] = []
    for index in indices:
        try:
            images[len(kept)] = torch.from_numpy(center_crop(source.read(index), size))
            kept.append(index)
        except BrokenImage as error:
            if not skip_broken:
                raise BrokenImage(f"{error}; remove the file, or pass --skip-broken") from None
            broken.append(str(error))
    return images[: len(kept)], kept, broken
