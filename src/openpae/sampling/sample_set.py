"""Sample sets on disk. Any number of processes write parts, an interrupted call goes on, one file results.

parts/              memory-mapped shards, one per batch, complete or absent; removed at the end
samples.npz         or images/, samples.safetensors, latents.safetensors: the samples
grid.png            the first samples
samples.json        the record; written last, so a folder with it is complete
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
from openpae.sampling.sampler import Decoder, evaluations, sample_batches, sample_images
from openpae.sampling.settings import FILES, Format, SamplerConfig
from openpae.storage.files import (
    atomic_file,
    atomic_folder,
    discard,
    file_hash,
    read_json,
    remove_folder,
    reserved,
    write_json,
)
from openpae.storage.outputs import check_outputs, made_by, read_record, run_lock

SAMPLES = "samples.json"
"""The record of a folder of samples."""
_SHOWN = 256  # images in grid.png


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """The samples to make, and their format."""

    labels: Tensor
    """Classes, (n,), on the CPU."""
    scheme: str
    """How the labels were chosen; the record repeats it."""
    sampler: SamplerConfig
    """Solver and guidance."""
    seed: int = 0
    """Sample i has its own noise from (seed, i)."""
    batch_size: int = 32
    """Samples per batch and per part."""
    format: Format = "npz"
    """File format of the samples."""
    columns: int = 8
    """Columns of grid.png."""
    facts: Mapping[str, Any]
    """What else the samples depend on: fingerprints, precision."""
    class_names: Sequence[str] | None = None
    """Names of the classes, for the rows of grid.png that show one class each."""

    def row_names(self, count: int) -> list[str]:
        """Label and name of the class of each row of grid.png, which shows the first `count` samples; empty
        if a row has several classes or no name."""
        labels, names = self.labels[:count].tolist(), self.class_names or ()
        rows = [set(labels[start : start + self.columns]) for start in range(0, count, self.columns)]
        if any(len(row) > 1 or max(row) >= len(names) for row in rows):
            return []
        return [f"{label} {names[label]}" for row in rows for label in row]

    def as_record(self) -> dict[str, Any]:
        """Everything that two equal sample sets have in common; part of samples.json."""
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


def write_samples(
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
    """Write samples to a folder. An interrupted call goes on with the missing parts.

    Memory holds one batch. Neither interruptions nor the number of processes change a bit of the files. Under
    torchrun every process must call this function, and all get the record.

    Args:
        out: the folder.
        samples: labels, sampler, seed and format.
        tokenizer: decodes. The generator must have been trained on its latents.
        generator: makes the latents, in evaluation mode.
        weak: guides in place of the null class, see `sampler.sample_latents`.
        progress: called with (done, all) of the missing parts of this process.
        inputs: paths that were read; nothing is written there.
        overwrite: replace files with the same names.

    Returns:
        The record, as in samples.json.

    Raises:
        ValueError: the folder holds other samples or files of the user with these names, another process
            samples there, or the settings do not fit the generator.
        DiskFull: the disk has no room for them.
    """
    processes.on_rank0(lambda: _spare(out, samples.format, inputs, overwrite))
    with run_lock(out, "sampling"):
        if overwrite:
            processes.on_rank0(lambda: _forget(out))
        return _write_missing(out, samples, tokenizer, generator, weak, progress)


def _spare(out: Path, format: Format, inputs: Sequence[Path | None], overwrite: bool) -> None:
    """Refuse to replace files that are not of an earlier call."""
    names = [out / name for name in (FILES[format], "grid.png", SAMPLES)]
    begun = made_by(out / "parts" / "header.json", kind="samples")
    ours = names if begun or "samples_sha256" in read_record(out / SAMPLES) else ()
    check_outputs(*names, into=out, inputs=inputs, own=ours, overwrite=overwrite)


def _forget(out: Path) -> None:
    """Remove the record and the parts of an earlier call."""
    (out / SAMPLES).unlink(missing_ok=True)
    if made_by(out / "parts" / "header.json", kind="samples"):
        remove_folder(out / "parts")


def _write_missing(
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
    labels, config, seed = samples.labels, samples.sampler, samples.seed
    spans = [layout.span(part) for part in own]
    if samples.format == "latents":
        batches = sample_batches(generator, labels, config, spans, seed=seed, weak=weak)
    else:
        images = sample_images(tokenizer, generator, labels, config, seed=seed, batches=spans, weak=weak)
        batches = map(quantize, images)
    for done, (part, span, batch) in enumerate(zip(own, spans, batches, strict=True), 1):
        writer.write(part, batch, labels[span.start : span.stop].tolist())
        if progress is not None:
            progress(done, len(own))
    processes.barrier()
    return processes.on_rank0(lambda: _finish(out, samples, writer))


def _finished(out: Path, samples: SampleSet) -> dict[str, Any] | None:
    """The record of a folder that holds all of these samples, otherwise None."""
    if not (out / SAMPLES).is_file():
        return None
    record, wanted = read_json(out / SAMPLES), samples.as_record()
    if changed := [key for key, value in wanted.items() if record.get(key) != value]:
        facts = ", ".join(f"{key} ({record.get(key)} there, {wanted[key]} now)" for key in changed[:4])
        raise ValueError(f"{out} holds other samples: another {facts}; name another folder, or delete it")
    if made_by(out / "parts" / "header.json", kind="samples"):  # killed after the record was written
        remove_folder(out / "parts")
    discard(reserved(out / "parts", "removed"))
    return record


def _layout(samples: SampleSet, tokenizer: Decoder, generator: VelocityModel, device: torch.device) -> Layout:
    shape: Sequence[int] = generator.config.latent_shape
    if samples.format != "latents":
        with torch.no_grad():
            shape = tokenizer.decode(torch.zeros(1, *shape, device=device)).shape[1:]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Layout(
        kind="samples",
        dtype="float32" if samples.format == "latents" else "uint8",
        shape=tuple(shape),
        sources=len(samples.labels),
        per_shard=samples.batch_size,
        # Two devices or two releases round differently; their parts must not mix.
        attributes=samples.as_record() | {"device": device_name, "torch": torch.__version__},
    )


def _finish(out: Path, samples: SampleSet, writer: ShardWriter) -> dict[str, Any]:
    shards = writer.finish()
    target = out / FILES[samples.format]
    if samples.format == "latents":
        _write_safetensors(target, "latents", shards)
        sha256 = file_hash(target)
    else:
        hashes: list[bytes] = []
        if samples.format == "safetensors":
            _write_safetensors(target, "images", shards, hashes)
        else:
            (_write_npz if samples.format == "npz" else _write_pngs)(target, shards, hashes)
        sha256 = hash_of_all(hashes)
        first = shards.gather(np.arange(min(len(shards), _SHOWN)))
        with atomic_file(out / "grid.png") as partial:
            names = samples.row_names(len(first))
            image_grid(to_unit(first), samples.columns, rows=names).save(partial, format="PNG")
    record = {
        **samples.as_record(),
        "samples_sha256": sha256,
        "processes": processes.world_size(),
        "device": writer.layout.attributes["device"],
        "versions": package_versions(),
    }
    write_json(out / SAMPLES, record)
    remove_folder(out / "parts")
    return record


def _write_npz(path: Path, shards: Shards, hashes: list[bytes]) -> None:
    """Equal to numpy.savez(path, images, labels), a block at a time."""
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


def _write_safetensors(path: Path, name: str, shards: Shards, hashes: list[bytes] | None = None) -> None:
    """A safetensors file of labels and rows, a block at a time: its library needs all in memory."""
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
    text += b" " * (-len(text) % 8)  # data start at a multiple of 8
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.writelines((struct.pack("<Q", len(text)), text, shards.labels.astype("<i8").tobytes()))
        for block in _blocks(shards, hashes):
            file.write(block.numpy().data)


def _blocks(shards: Shards, hashes: list[bytes] | None, size: int = 256) -> Iterator[Tensor]:
    """All rows in order, `size` at a time. The hash of each image is appended to `hashes`."""
    for start in range(0, len(shards), size):
        block = shards.gather(np.arange(start, min(start + size, len(shards))))
        if hashes is not None:
            hashes += hashes_of(block)
        yield block
