"""Samples on disk: drawn in parts by any number of processes, resumed where they stopped, and then one file.

parts/              memory-mapped shards, one per batch, whole or absent; removed at the end
samples.npz         or images/, samples.safetensors, latents.safetensors: what the parts become
grid.png            the first of them, to look at
samples.json        how they were made, written last: with it the folder is complete
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openpae import config as configs
from openpae.data.pixels import hash_of_all, hashes_of, image_grid, quantize, to_unit
from openpae.data.shard_writer import ShardWriter
from openpae.data.shards import Layout, Shards
from openpae.runtime import processes
from openpae.runtime.provenance import package_versions
from openpae.sampling.guidance import VelocityModel
from openpae.sampling.sampler import Decoder, decoded, evaluations, sample_batches
from openpae.sampling.settings import FILES, Format, SamplerConfig
from openpae.storage.files import (
    atomic_file,
    atomic_folder,
    discard,
    file_hash,
    read_json,
    remove_folder,
    write_json,
)
from openpae.storage.outputs import check_outputs, made_by, read_record, run_lock

_SHOWN = 256  # images in a picture that can still be looked at


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """What is to be drawn, and how it is kept."""

    labels: Tensor
    """Classes, (n,), on the CPU; sample i has its own noise from (seed, i)."""
    scheme: str
    """What a record says of the labels."""
    sampler: SamplerConfig
    """Solver and guidance."""
    seed: int = 0
    """Another seed, other samples."""
    batch_size: int = 32
    """Samples at once, and per part."""
    format: Format = "npz"
    """What becomes of them."""
    columns: int = 8
    """Of the picture."""
    facts: Mapping[str, Any]
    """What else makes them what they are: fingerprints, precision."""

    def as_record(self) -> dict[str, Any]:
        """All that a sample set must share with another to be the same: what the record repeats."""
        unused = ("steps", "shift") if self.sampler.solver == "rk45" else ("tolerance",)
        sampler = {key: value for key, value in configs.to_dict(self.sampler).items() if key not in unused}
        return {
            "count": len(self.labels),
            "labels": self.scheme,
            "seed": self.seed,
            **sampler,
            "nfe": evaluations(self.sampler),
            "batch_size": self.batch_size,
            "format": self.format,
            **self.facts,
        }


def draw_samples(
    out: Path,
    samples: SampleSet,
    tokenizer: Decoder,
    generator: VelocityModel,
    *,
    weak: VelocityModel | None = None,
    progress: Callable[[int, int], None] | None = None,
    inputs: Sequence[Path | None] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Draw samples into a folder; an interrupted call goes on with the parts that are missing.

    No more than a batch is in memory. The files do not depend on interruptions, to the bit, nor on the
    number of processes. Under torchrun every process must call it, and all get the record.

    Args:
        out: the folder.
        samples: what to draw.
        tokenizer: decodes; the one whose latents the generator was trained on.
        generator: makes the latents, in evaluation mode.
        weak: guides in place of the null class, see `sampling.sample_latents`.
        progress: called with (done, all) parts, of those that were missing, by this process.
        inputs: what was read for it; nothing is written there.
        overwrite: replace what has the names of these files.

    Returns:
        The record, as in samples.json.

    Raises:
        ValueError: the folder holds other samples, or files of the user with the names of these, or another
            process draws there; or the settings do not fit the generator.
        DiskFull: there is no room for them.
    """
    processes.on_rank0(lambda: _spare(out, samples.format, inputs, overwrite))
    with run_lock(out, "sampling"):
        if overwrite:
            processes.on_rank0(lambda: _forget(out))
        return _draw(out, samples, tokenizer, generator, weak, progress)


def _spare(out: Path, format: Format, inputs: Sequence[Path | None], overwrite: bool) -> None:
    """See that what will be written is new, or of an earlier call."""
    names = [out / name for name in (FILES[format], "grid.png", "samples.json")]
    begun = made_by(out / "parts" / "header.json", kind="samples")
    ours = names if begun or "samples_sha256" in read_record(out / "samples.json") else ()
    check_outputs(*names, into=out, inputs=inputs, own=ours, overwrite=overwrite)


def _forget(out: Path) -> None:
    """Have the samples of an earlier call drawn anew."""
    (out / "samples.json").unlink(missing_ok=True)
    if made_by(out / "parts" / "header.json", kind="samples"):
        remove_folder(out / "parts")


def _draw(
    out: Path,
    samples: SampleSet,
    tokenizer: Decoder,
    generator: VelocityModel,
    weak: VelocityModel | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    if (finished := processes.on_rank0(lambda: _finished(out, samples))) is not None:
        return finished
    device = next(generator.parameters()).device
    layout = _layout(samples, tokenizer, generator, device)
    writer = processes.on_rank0(lambda: ShardWriter(out / "parts", layout))
    missing = processes.broadcast(writer.missing())
    own = [missing[i] for i in processes.rank_slice(len(missing))]
    latents = sample_batches(
        generator,
        samples.labels,
        samples.sampler,
        (layout.span(part) for part in own),
        seed=samples.seed,
        weak=weak,
    )
    batches = latents if samples.format == "latents" else map(quantize, decoded(tokenizer, latents))
    for done, (part, batch) in enumerate(zip(own, batches, strict=True), 1):
        span = layout.span(part)
        writer.write(part, batch, samples.labels[span.start : span.stop].tolist())
        if progress is not None:
            progress(done, len(own))
    processes.barrier()
    return processes.on_rank0(lambda: _finish(out, samples, writer))


def _finished(out: Path, samples: SampleSet) -> dict[str, Any] | None:
    """The record of a folder that holds these samples already; None where they are still to be drawn."""
    if not (out / "samples.json").is_file():
        return None
    record, told = read_json(out / "samples.json"), samples.as_record()
    if changed := [key for key, value in told.items() if record.get(key) != value]:
        facts = ", ".join(f"{key} ({record.get(key)} there, {told[key]} now)" for key in changed[:4])
        raise ValueError(f"{out} holds other samples: another {facts}; name another folder, or delete it")
    if made_by(out / "parts" / "header.json", kind="samples"):  # killed between the record and this
        remove_folder(out / "parts")
    discard(out / ".parts.removed")
    return record


def _layout(samples: SampleSet, tokenizer: Decoder, generator: VelocityModel, device: torch.device) -> Layout:
    shape: Sequence[int] = generator.config.latent_shape
    if samples.format != "latents":
        with torch.no_grad():
            shape = tokenizer.decode(torch.zeros(1, *shape, device=device)).shape[1:]
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Layout(
        kind="samples",
        dtype="float32" if samples.format == "latents" else "uint8",
        shape=tuple(shape),
        sources=len(samples.labels),
        per_shard=samples.batch_size,
        # Parts of two devices or releases would not be those of an undisturbed run.
        attributes=samples.as_record() | {"device": place, "torch": torch.__version__},
    )


def _finish(out: Path, samples: SampleSet, writer: ShardWriter) -> dict[str, Any]:
    shards = writer.finish()
    target = out / FILES[samples.format]
    if samples.format == "latents":
        _write_safetensors(target, "latents", shards)
        sha256 = file_hash(target)
    else:
        hashes: list[bytes] = []
        write = {"npz": _write_npz, "png": _write_pngs, "safetensors": _write_images}[samples.format]
        write(target, shards, hashes)
        sha256 = hash_of_all(hashes)
        first = shards.gather(np.arange(min(len(shards), _SHOWN)))
        with atomic_file(out / "grid.png") as partial:
            image_grid(to_unit(first), samples.columns).save(partial, format="PNG")
    record = {
        **samples.as_record(),
        "samples_sha256": sha256,
        "processes": processes.world_size(),
        "device": writer.layout.attributes["device"],
        "versions": package_versions(),
    }
    write_json(out / "samples.json", record)
    remove_folder(out / "parts")
    return record


def _write_npz(path: Path, shards: Shards, hashes: list[bytes]) -> None:
    """As numpy.savez(path, images, labels) would, a block at a time."""
    _, height, width = shards.shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(shards), height, width, 3)}
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in _blocks(shards, hashes):
                file.write(block.permute(0, 2, 3, 1).contiguous().numpy().data)
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, shards.labels)


def _write_pngs(path: Path, shards: Shards, hashes: list[bytes]) -> None:
    with atomic_folder(path) as partial, ThreadPoolExecutor(os.cpu_count()) as pool:
        done = 0
        for block in _blocks(shards, hashes):
            names = [partial / f"{done + row:06d}.png" for row in range(len(block))]
            pixels = block.permute(0, 2, 3, 1).contiguous().numpy()
            list(pool.map(lambda image, name: Image.fromarray(image).save(name), pixels, names))
            done += len(block)


def _write_images(path: Path, shards: Shards, hashes: list[bytes]) -> None:
    _write_safetensors(path, "images", shards, hashes)


def _write_safetensors(path: Path, name: str, shards: Shards, hashes: list[bytes] | None = None) -> None:
    """A safetensors file of labels and rows, a block at a time: its library wants all of it in memory."""
    count, itemsize = len(shards), shards.dtype.itemsize
    ends = (8 * count, 8 * count + itemsize * count * int(np.prod(shards.shape)))
    header: dict[str, Any] = {
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, ends[0]]},
        name: {
            "dtype": "U8" if shards.dtype == torch.uint8 else "F32",
            "shape": [count, *shards.shape],
            "data_offsets": list(ends),
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.writelines((struct.pack("<Q", len(text)), text, shards.labels.astype("<i8").tobytes()))
        for block in _blocks(shards, hashes):
            file.write(block.numpy().data)


def _blocks(shards: Shards, hashes: list[bytes] | None, size: int = 256) -> Iterator[Tensor]:
    """All rows in order, a few at a time; what names each image is added to `hashes`."""
    for start in range(0, len(shards), size):
        block = shards.gather(np.arange(start, min(start + size, len(shards))))
        if hashes is not None:
            hashes += hashes_of(block)
        yield block
