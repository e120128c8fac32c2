"""Caches of VFM features, refined targets and latents.

`shard_writer.ShardWriter` decides what a begun cache accepts. What training accepts is decided where a cache
is opened: `train.generator._check_latents` for latents, `training.check_features` for features and targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpae.data.crops import Size, plain_size
from openpae.data.images import ImageSource, PackedImages
from openpae.data.packing import decode_batch, in_order
from openpae.data.pixels import to_unit
from openpae.data.shard_writer import Part, write_shards
from openpae.data.shards import TYPES, Layout, Shards
from openpae.runtime import processes

Progress = Callable[[int, int], None]


def cache_latents(
    encode: Callable[[Tensor], Tensor],
    source: ImageSource,
    folder: Path,
    *,
    image_size: Size,
    latent_shape: tuple[int, int, int],
    tokenizer_fingerprint: str,
    precision: str = "fp32",
    batch_size: int = 32,
    flips: bool = True,
    skip_broken: bool = False,
    per_shard: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Shards:
    """Write latents of images and of their mirror images in shards. An interrupted call resumes.

    Args:
        encode: maps images in [0, 1], (B, 3, H, W), to latents (B, C, h, w) in any precision.
        source: the images; each is centre-cropped to `image_size`.
        folder: output folder.
        image_size: (H, W), or the side of a square.
        latent_shape: (C, h, w).
        tokenizer_fingerprint: fingerprint of the tokenizer; generator training compares it.
        precision: precision of `encode`; stored, so that a cache does not mix two.
        batch_size: images per forward pass.
        flips: encode the mirror images too.
        skip_broken: leave out files that cannot be decoded, and list them in index.json.
        per_shard: images per shard, rounded up to full batches so that a resumed call makes the same passes.
        device: device of the images that `encode` gets.
        progress: called with (done, total) images.

    Returns:
        The complete cache: rows (flips, C, h, w) in bfloat16, labels, mean and std per channel.

    Raises:
        BrokenImage: a file cannot be decoded and skip_broken is off.
        ValueError: the folder was begun with another tokenizer, image size, precision or other images.
    """
    attributes = {
        "tokenizer": tokenizer_fingerprint,
        "image_size": plain_size(image_size),
        "precision": precision,
    }
    shape = (2 if flips else 1, *latent_shape)
    layout = _layout("latents", "bfloat16", shape, source, batch_size, per_shard, attributes)
    return _fill(folder, layout, encode, source, image_size, batch_size, skip_broken, device, progress)


def cache_features(
    features: Callable[[Tensor], Tensor],
    source: ImageSource,
    folder: Path,
    *,
    image_size: Size,
    shape: tuple[int, int],
    encoder_fingerprint: str,
    flips: bool,
    batch_size: int = 32,
    per_shard: int = 1024,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Shards:
    """Write float16 features of packed images: the frozen encoder is most of the cost on a small machine.

    Args:
        features: maps images in [0, 1], (B, 3, H, W), to features (B, N, D).
        source: packed images; row i of the cache belongs to image i.
        shape: (N, D).
        encoder_fingerprint: fingerprint of the encoder's weights.
        flips: cache the mirror images too, for the augmentation "flip".
        folder, image_size, batch_size, per_shard, device, progress: see `cache_latents`.

    Raises:
        ValueError: the images are not packed, or the folder was begun with another encoder or other images.
    """
    if not isinstance(source, PackedImages):
        raise ValueError("data.feature_cache needs packed images; make them with: pae pack IMAGES OUT")
    attributes = {"encoder": encoder_fingerprint, "image_size": plain_size(image_size)}
    layout = _layout(
        "features", "float16", (2 if flips else 1, *shape), source, batch_size, per_shard, attributes
    )
    return _fill(folder, layout, features, source, image_size, batch_size, False, device, progress)


@torch.no_grad()
def cache_latents_of_features(
    encode: Callable[[Tensor, Tensor], Tensor],
    source: PackedImages,
    features: Shards,
    folder: Path,
    *,
    latent_shape: tuple[int, int, int],
    tokenizer_fingerprint: str,
    precision: str = "fp32",
    batch_size: int = 64,
    flips: bool = True,
    per_shard: int = 4096,
    device: torch.device | str = "cpu",
) -> Shards:
    """`cache_latents` from cached features, without the frozen VFM.

    Cached features are float16, so the latents differ from `cache_latents` in the last digits.

    Args:
        encode: maps images in [0, 1], (B, 3, H, W), and features (B, N, D) to latents (B, C, h, w).
        source: the images, at the tokenizer's size.
        features: their cache (`cache_features`), with the mirror images if `flips` is on.
        folder, latent_shape, tokenizer_fingerprint, precision, batch_size, flips, per_shard, device: see
            `cache_latents`.

    Raises:
        ValueError: the features are of other images or lack the mirror images, or the folder was begun with
            another tokenizer or other images.
    """
    versions = 2 if flips else 1
    if features.attributes["images"] != source.fingerprint() or features.shape[0] < versions:
        raise ValueError(
            f"the features in {features.folder} are not those of the images in {source.shards.folder}"
            + (" and of their mirror images" if flips else "")
        )
    attributes = {
        "tokenizer": tokenizer_fingerprint,
        "image_size": features.attributes["image_size"],
        "precision": precision,
    }
    layout = _layout(
        "latents", "bfloat16", (versions, *latent_shape), source, batch_size, per_shard, attributes
    )

    def parts(span: range) -> Iterator[Part]:
        for start in range(span.start, span.stop, batch_size):
            rows = np.arange(start, min(start + batch_size, span.stop))
            x, known = to_unit(source.shards.gather(rows).to(device)), features.gather(rows).to(device)
            latents = [
                encode(view, known[:, version]).cpu()
                for version, view in enumerate((x, x.flip(-1))[:versions])
            ]
            yield Part(rows=torch.stack(latents, dim=1), labels=source.labels[rows].tolist())

    return write_shards(folder, layout, parts)


@torch.no_grad()
def cache_targets(
    prior: Callable[[Tensor], Tensor],
    features: Shards,
    folder: Path,
    *,
    prior_fingerprint: str,
    latent_dim: int,
    batch_size: int = 64,
    per_shard: int = 4096,
    device: torch.device | str = "cpu",
) -> Shards:
    """Write the refined targets of cached features, float16. They are fixed, so one pass serves all epochs.

    Args:
        prior: maps features (B, N, D) to targets (B, N, C).
        features: cache of `cache_features`; row i of the result belongs to its row i.
        prior_fingerprint: fingerprint of the prior.
        latent_dim: C.
        folder, batch_size, per_shard, device: see `cache_latents`.

    Raises:
        ValueError: the folder was begun with another prior or other features.
    """
    versions, tokens, _ = features.shape
    layout = Layout(
        kind="targets",
        dtype="float16",
        shape=(versions, tokens, latent_dim),
        sources=len(features),
        per_shard=per_shard,
        attributes={**features.attributes, "prior": prior_fingerprint},
    )

    def parts(span: range) -> Iterator[Part]:
        rows = np.arange(span.start, span.stop)
        for part in np.split(rows, range(batch_size, len(rows), batch_size)):
            flat = features.gather(part).to(device).flatten(0, 1)
            targets = prior(flat).to(torch.float16).cpu().view(len(part), *layout.shape)
            yield Part(rows=targets, labels=features.labels[part].tolist())

    return write_shards(folder, layout, parts)


def _layout(
    kind: str,
    dtype: str,
    shape: tuple[int, ...],
    source: ImageSource,
    batch_size: int,
    per_shard: int,
    attributes: dict[str, Any],
) -> Layout:
    return Layout(
        kind=kind,
        dtype=dtype,
        shape=shape,
        sources=len(source),
        per_shard=-(-per_shard // batch_size) * batch_size,
        attributes=attributes | {"images": source.fingerprint(), "classes": source.classes},
    )


def _fill(
    folder: Path,
    layout: Layout,
    function: Callable[[Tensor], Tensor],
    source: ImageSource,
    size: Size,
    batch_size: int,
    skip_broken: bool,
    device: torch.device | str,
    progress: Progress | None,
) -> Shards:
    """Run images and mirror images through a network while threads decode the next batches."""

    def read(batch: range) -> tuple[Tensor, list[int], list[str]]:
        return decode_batch(source, batch, size, skip_broken)

    def parts(span: range) -> Iterator[Part]:
        batches = [span[start : start + batch_size] for start in range(0, len(span), batch_size)]
        decoded = in_order(pool, read, batches, ahead=threads + 1)
        for batch, (images, kept, broken) in zip(batches, decoded, strict=True):
            rows = _both_ways(function, images.to(device), layout) if kept else torch.empty(0, *layout.shape)
            yield Part(rows=rows, labels=source.labels[kept].tolist(), skipped=broken)
            if progress:
                progress(batch.stop, layout.sources)

    threads = processes.own_cores()
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return write_shards(folder, layout, parts)


@torch.no_grad()
def _both_ways(function: Callable[[Tensor], Tensor], images: Tensor, layout: Layout) -> Tensor:
    x = to_unit(images)
    versions = [x, x.flip(-1)][: layout.shape[0]]
    return torch.stack([function(version).to(TYPES[layout.dtype]).cpu() for version in versions], dim=1)
