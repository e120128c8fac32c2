"""Streams of numbered images to measure: real images, npz files, folders, tensors, the sampler.

Under torchrun each process gets its share. The numbers identify the images.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae import config as configs
from openpae.data.crops import Size, center_crop, height_width
from openpae.data.images import ImageFolder, ImageSource, PackedImages
from openpae.data.npz import npz_entry, npz_keys
from openpae.data.pixels import check_images, to_unit
from openpae.runtime.device import autocast
from openpae.runtime.processes import rank_slice
from openpae.sampling.guidance import VelocityModel
from openpae.sampling.sampler import Decoder, evaluations, sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import read_json

Facts = Mapping[str, Any]
Rows = Sequence[int] | NDArray[np.int64]

_LARGEST_IMAGE = 2**28
"""Most bytes of one image of an npz file. A compressed megabyte can claim a thousand times as much."""
AS_STORED = "as stored"
"""Preprocessing of images that are neither resized nor cropped."""


class Batch(NamedTuple):
    """A batch of a stream."""

    images: Tensor
    """(B, 3, H, W) in [0, 1]."""
    numbers: Sequence[int]
    """Index of each image in the stream, in [0, count)."""


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Images of one size, read once and in batches."""

    name: str
    """Name in records."""
    count: int
    """Images of all processes."""
    size: tuple[int, int]
    """(H, W)."""
    preprocessing: str
    """Resize and crop, in words."""
    batches: Callable[[int], Iterator[Batch]]
    """From a batch size to the batches of this process."""
    facts: Facts = field(default_factory=dict)
    """How the images were made, as far as known: sampler, tokenizer, generator, samples_sha256."""


def counted(images: ImageStream, progress: Callable[[int, int], None] | None) -> ImageStream:
    """The same stream; after each batch `progress` gets (done, all) images of this process."""
    if progress is None:
        return images

    def batches(batch_size: int) -> Iterator[Batch]:
        done, total = 0, len(rank_slice(images.count))
        for batch in images.batches(batch_size):
            yield batch
            done += len(batch.numbers)
            progress(done, total)

    return dataclasses.replace(images, batches=batches)


def real_images(source: ImageSource, size: Size, *, name: str = "", rows: Rows | None = None) -> ImageStream:
    """Real images with ADM's centre crop.

    Args:
        source: a folder of images, or packed images.
        size: (H, W), or the side of squares.
        name: name in records; by default the fingerprint.
        rows: indices of the images, in order; None takes all.
    """
    height, width = height_width(size)
    chosen = range(len(source)) if rows is None else [int(row) for row in rows]

    def batches(batch_size: int) -> Iterator[Batch]:
        own = rank_slice(len(chosen))
        images = source_batches(source, size, batch_size, [chosen[i] for i in own])
        yield from map(Batch, images, _parts(own, batch_size))

    return ImageStream(
        name=name or source.fingerprint(),
        count=len(chosen),
        size=(height, width),
        preprocessing="halved by boxes while twice too large, then bicubic; "
        f"centre crop to {height} x {width}",
        batches=batches,
        facts={"data": source.fingerprint()},
    )


def source_batches(
    source: ImageSource, size: Size, batch_size: int, indices: Rows | None = None
) -> Iterator[Tensor]:
    """Centre-cropped images of a source, (B, 3, H, W) in [0, 1], in order.

    A folder's images that are smaller than `size` are enlarged, as in ADM's references, with a warning.

    Raises:
        ValueError: all images, or packed ones, are smaller than `size`.
        BrokenImage: a file cannot be decoded.
    """
    height, width = height_width(size)
    packed = source.image_shape if isinstance(source, PackedImages) else None
    if packed is not None and (packed[0] < height or packed[1] < width):
        raise ValueError(
            f"{source.name(0)} is of {packed[0]} x {packed[1]} pixels, {height} x {width} are needed; "
            "enlarging them would change every distance: pack the originals again"
        )
    rows = range(len(source)) if indices is None else indices
    enlarged = 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        if isinstance(source, PackedImages) and packed == (height, width):
            yield to_unit(source.shards.gather(np.asarray(part, dtype=np.int64)))
            continue
        images = [source.read(int(row)) for row in part]
        enlarged += sum(image.height < height or image.width < width for image in images)
        yield to_unit(torch.stack([torch.from_numpy(center_crop(image, size)) for image in images]))
    if enlarged and enlarged == len(rows):
        raise ValueError(
            f"all {enlarged} images are smaller than the {height} x {width} pixels that are needed (the "
            f"last is {source.name(int(rows[-1]))}); enlarging them would change every distance: take the "
            "originals"
        )
    if enlarged:
        warnings.warn(
            f"{enlarged} of {len(rows)} images are smaller than {height} x {width} pixels and were enlarged",
            stacklevel=2,
        )


def stored_images(path: Path) -> ImageStream:
    """Generated images of a file or folder: an npz file (ADM layout), or a folder of image files.

    The record of `pae sample` (samples.json, or the npz's name with .json) gives the facts, if it exists.

    Args:
        path: the file, the folder, or a folder of `pae sample`.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: no images, or images of several sizes.
    """
    # A folder of pae sample also holds grid.png, which is no sample.
    if (path / "samples.npz").is_file():
        path = path / "samples.npz"
    elif (path / "samples.json").is_file():
        path = path / "images"
    if path.is_dir():
        return _folder_images(path)
    if not path.is_file():
        raise FileNotFoundError(f"no samples at {path}; give an npz file (arr_0) or a folder of images")
    return npz_stream(path, _read_sidecar(path.with_suffix(".json")))


def npz_stream(path: Path, facts: Facts | None = None, *, count: int | None = None) -> ImageStream:
    """The images of an npz file, uint8 (N, H, W, 3) as arr_0.

    Args:
        path: the file.
        facts: how the images were made.
        count: take the first `count` images; None takes all.

    Raises:
        ValueError: the file holds no such images.
    """
    known, height, width = _npz_header(path)
    taken = known if count is None else min(count, known)
    if known == 0:
        raise ValueError(f"{path} holds no images")
    return ImageStream(
        name=str(path),
        count=taken,
        size=(height, width),
        preprocessing=AS_STORED,
        batches=lambda batch_size: _npz_batches(path, batch_size, taken),
        facts=facts or {},
    )


def tensor_images(
    images: Tensor, *, name: str = "tensors", preprocessing: str = "as given", facts: Facts | None = None
) -> ImageStream:
    """Images of a tensor.

    Args:
        images: (N, 3, H, W) in [0, 1]; under torchrun the same in every process.
        name: name in records.
        preprocessing: resize and crop, in words.
        facts: how the images were made.

    Raises:
        ValueError: not such images, or N = 0.
    """
    check_images(images)

    def batches(batch_size: int) -> Iterator[Batch]:
        for part in _parts(rank_slice(len(images)), batch_size):
            yield Batch(images[part.start : part.stop : part.step], part)

    return ImageStream(
        name=name,
        count=len(images),
        size=(images.shape[-2], images.shape[-1]),
        preprocessing=preprocessing,
        batches=batches,
        facts=facts or {},
    )


def sampled_images(
    tokenizer: Decoder,
    generator: VelocityModel,
    labels: Tensor,
    config: SamplerConfig,
    *,
    size: Size,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    weak: VelocityModel | None = None,
    facts: Facts | None = None,
) -> ImageStream:
    """Samples of a generator, each process its share. No file is written.

    Args:
        tokenizer: decodes.
        generator: makes the latents, in evaluation mode.
        labels: classes, (n,), on the CPU.
        config: solver and guidance.
        size: (H, W) of the decoded images, or the side of squares.
        seed: sample i depends on (seed, i) alone.
        precision: of the networks; the solver works in float32.
        weak: a generator that guides in place of the null class; see `sample_latents`.
        facts: what else is known of the samples (fingerprints, the scheme of the labels).

    Raises:
        ValueError: see `sample_latents`, or there is no label.
    """
    if not len(labels):
        raise ValueError("at least one label is needed to sample an image, got none")
    device = next(generator.parameters()).device

    def batches(batch_size: int) -> Iterator[Batch]:
        parts = list(_parts(rank_slice(len(labels)), batch_size))
        images = sample_images(tokenizer, generator, labels, config, seed=seed, batches=parts, weak=weak)
        for part in parts:
            # Closed before the batch is yielded: metrics are computed in float32.
            with autocast(device, precision):
                pixels = next(images)
            yield Batch(pixels, part)

    return ImageStream(
        name="sampler",
        count=len(labels),
        size=height_width(size),
        preprocessing="decoded, clamped to [0, 1]",
        batches=batches,
        facts={
            **configs.to_dict(config),
            "nfe": evaluations(config),
            "precision": precision,
            "seed": seed,
            **(facts or {}),
        },
    )


def _npz_batches(path: Path, batch_size: int, count: int) -> Iterator[Batch]:
    """This process's share of the first `count` images. Memory holds one batch."""
    known, height, width = _npz_header(path)
    own = rank_slice(count)
    with npz_entry(path, "arr_0") as (file, _):
        # Every process reads the full file: decompression cannot start in the middle.
        for start in range(0, count, batch_size * own.step):
            rows = range(start, min(start + batch_size * own.step, count))
            data = file.read(len(rows) * height * width * 3)
            if len(data) < len(rows) * height * width * 3:
                raise ValueError(f"arr_0 ends before its {known} images do")
            if mine := rows[own.start :: own.step]:
                pixels = np.frombuffer(data, np.uint8).reshape(len(rows), height, width, 3)
                images = torch.from_numpy(pixels[own.start :: own.step].copy()).permute(0, 3, 1, 2)
                yield Batch(to_unit(images), mine)
        if count == known:
            file.read(1)  # zipfile compares the checksum at the end


def _npz_header(path: Path) -> tuple[int, int, int]:
    """(N, H, W) of the images of an npz file."""
    if "arr_0" not in (keys := npz_keys(path)):
        raise ValueError(f"{path} holds no images (arr_0); it holds: {', '.join(sorted(keys)) or 'nothing'}")
    with npz_entry(path, "arr_0") as (_, (shape, fortran, dtype)):
        pass
    if fortran or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
        raise ValueError(
            f"arr_0 in {path} must be uint8 images (N, H, W, 3) from 0 to 255, got {dtype} {shape}"
        )
    if math.prod(shape[1:]) > _LARGEST_IMAGE:
        raise ValueError(
            f"arr_0 in {path} holds images of {shape[1]} x {shape[2]} pixels, too large to measure"
        )
    return shape[0], shape[1], shape[2]


def _folder_images(path: Path) -> ImageStream:
    """The images of a folder. All must have one size."""
    source = ImageFolder(path)
    width, height = source.read(0).size

    def batches(batch_size: int) -> Iterator[Batch]:
        for part in _parts(rank_slice(len(source)), batch_size):
            images = [source.read(row) for row in part]
            for row, image in zip(part, images, strict=True):
                if image.size != (width, height):
                    raise ValueError(
                        f"samples must all have one size, got {image.width} x {image.height} in "
                        f"{path / source.name(row)} after {width} x {height} in {path / source.name(0)}; "
                        "keep other pictures out of the folder"
                    )
            pixels = np.stack([np.asarray(image) for image in images])
            yield Batch(to_unit(torch.from_numpy(pixels).permute(0, 3, 1, 2)), part)

    return ImageStream(
        name=str(path),
        count=len(source),
        size=(height, width),
        preprocessing=AS_STORED,
        batches=batches,
        facts=_read_sidecar(path.with_name("samples.json")) if path.name == "images" else {},
    )


def _read_sidecar(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _parts(rows: range, batch_size: int) -> Iterator[range]:
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]
