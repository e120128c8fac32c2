"""Import of latent caches that other programs wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openpae.data.caches import Progress
from openpae.data.shard_writer import Part, shard_folder
from openpae.data.shards import Layout, Shards

_MOST_CLASSES = 2**20
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class _File:
    """The content of one file of such a cache."""

    path: Path
    labels: Tensor
    shape: tuple[int, ...]
    dtype: str
    flips: bool

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows (stop - start, versions, C, h, w)."""
        with safe_open(self.path, "pt") as file:
            names = ("latents", "latents_flip") if self.flips else ("latents",)
            return torch.stack([file.get_slice(name)[start:stop] for name in names], dim=1)


def import_latents(
    source: Path,
    folder: Path,
    *,
    tokenizer_fingerprint: str,
    image_size: int,
    latent_shape: tuple[int, int, int],
    num_classes: int | None = None,
    per_shard: int = 4096,
    chunk: int = 256,
    progress: Progress | None = None,
) -> Shards:
    """Convert a folder of safetensors shards, as the scripts of LightningDiT and PAE write them, to a cache.

    They hold `latents`, `labels` and optionally `latents_flip`. The latents keep their precision and
    are not normalised; their statistics are computed over all rows. An interrupted import continues.

    Args:
        source: the folder; its .safetensors files are read in order of their names.
        folder: of the new cache.
        tokenizer_fingerprint: fingerprint of the tokenizer of the latents; generator training compares it.
        image_size: side of the encoded images.
        latent_shape: (C, h, w) of that tokenizer.
        num_classes: K; None: the largest label plus one.
        per_shard: rows per shard.
        chunk: rows in memory at once.
        progress: called with (done, all) rows.

    Raises:
        FileNotFoundError: the source has no such files.
        ValueError: a file is damaged, differs in kind from the others or from the tokenizer's latents, or a
            label lies outside of the classes.
    """
    first, *_ = files = _opened(source)
    if first.shape != latent_shape:
        raise ValueError(f"{source} holds latents {first.shape}, but the tokenizer makes {latent_shape}")
    labels = torch.cat([file.labels for file in files])
    count = _count_classes(source, labels, num_classes)
    attributes: dict[str, Any] = {
        "tokenizer": tokenizer_fingerprint,
        "image_size": image_size,
        "precision": "fp32",
        "images": _fingerprint(files, labels),
        "classes": [str(label) for label in range(count)],
        "source": "imported",
    }
    layout = Layout(
        kind="latents",
        dtype=first.dtype,
        shape=(2 if first.flips else 1, *first.shape),
        sources=len(labels),
        per_shard=per_shard,
        attributes=attributes,
    )
    with shard_folder(folder, layout) as writer:
        for shard in writer.missing():
            writer.write_parts(shard, _parts(files, layout.span(shard), chunk))
            if progress:
                progress(layout.span(shard).stop, layout.sources)
        return writer.finish()


def _fingerprint(files: list[_File], labels: Tensor) -> str:
    facts = repr([(file.path.name, file.path.stat().st_size) for file in files]).encode()
    return hashlib.sha256(facts + labels.numpy().tobytes()).hexdigest()[:16]


def _count_classes(source: Path, labels: Tensor, num_classes: int | None) -> int:
    if not len(labels):
        raise ValueError(f"{source} holds no latents: its files have no rows")
    lowest, highest = int(labels.min()), int(labels.max())
    count = highest + 1 if num_classes is None else num_classes
    if count > _MOST_CLASSES:
        raise ValueError(
            f"{source} would have {count:,} classes, at most {_MOST_CLASSES:,} are taken; see its labels"
        )
    if not 0 <= lowest <= highest < count:
        raise ValueError(f"labels in {source} must lie in [0, {count - 1}], got {lowest} to {highest}")
    return count


def _opened(source: Path) -> list[_File]:
    paths = sorted(source.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no .safetensors files in {source}")
    files = [_read(path) for path in paths]
    for file in files[1:]:
        first, other = ((f.shape, f.dtype, f.flips) for f in (files[0], file))
        if first != other:
            raise ValueError(
                f"{file.path} holds latents {other[0]} in {other[1]}, but {files[0].path.name} {first[0]} "
                f"in {first[1]}; a cache must be of one kind, with or without latents_flip"
            )
    return files


def _read(path: Path) -> _File:
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if not {"latents", "labels"} <= names <= {"latents", "latents_flip", "labels"}:
                raise ValueError(
                    f"{path} must hold latents, labels and, if any, latents_flip, got "
                    f"{', '.join(sorted(names)) or 'nothing'}"
                )
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            dtype = file.get_slice("latents").get_dtype()
            labels = file.get_tensor("labels")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    rows, *shape = shapes["latents"]
    if (
        len(shape) != 3
        or shapes.get("latents_flip", shapes["latents"]) != shapes["latents"]
        or shapes["labels"] != (rows,)
        or dtype not in _TYPES
        or labels.is_floating_point()
    ):
        raise ValueError(
            f"{path} must hold latents (N, C, h, w), as many latents_flip and N integer labels, got {shapes} "
            f"in {dtype}"
        )
    return _File(
        path=path,
        labels=labels.long(),
        shape=tuple(shape),
        dtype=_TYPES[dtype],
        flips="latents_flip" in names,
    )


def _parts(files: list[_File], span: range, chunk: int) -> Iterator[Part]:
    """The rows of a span, in chunks."""
    begin = 0
    for file in files:
        start, stop = max(span.start - begin, 0), min(span.stop - begin, len(file.labels))
        for at in range(start, stop, chunk):
            end = min(at + chunk, stop)
            yield Part(rows=file.rows(at, end), labels=file.labels[at:end].tolist())
        begin += len(file.labels)
