"""Write folders of shards. An interrupted writer resumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae.data.shards import STORED, TYPES, Layout, Shards, index_of, read_infos
from openpae.runtime import processes
from openpae.storage.files import (
    atomic_file,
    file_hash,
    fingerprints_agree,
    read_json,
    reserved,
    write_json,
)
from openpae.storage.outputs import LOCK, locked, make_folder


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows of a shard, in order."""

    rows: Tensor
    """(R, *shape), on any device."""
    labels: Sequence[int]
    """(R,) class indices."""
    skipped: Sequence[str] = ()
    """Messages for the source items that could not be read."""


class ShardWriter:
    """Write a folder shard by shard. Complete shards are kept, so an interrupted writer resumes.

    Args:
        folder: output folder; made if absent.
        layout: layout of the rows.

    Raises:
        ValueError: the folder was begun with another layout, or holds other files.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        header = folder / "header.json"
        check_shard_folder(folder, layout.kind)
        if header.is_file():
            begun = read_json(header)
            if changed := sorted(_differing(begun, layout.as_header())):
                raise ValueError(
                    f"{folder} was begun with another {', '.join(changed)}; delete the folder or name another"
                )
            # An older header may hold a shorter fingerprint of the same images.
            self.layout = replace(layout, attributes=begun["attributes"])
        else:
            make_folder(folder)
            write_json(header, layout.as_header())

    def missing(self) -> list[int]:
        """Numbers of the shards not yet written."""
        return [shard for shard in range(self.layout.num_shards) if not self._file(shard).is_file()]

    def write(self, shard: int, rows: Tensor, labels: Sequence[int], skipped: Sequence[str] = ()) -> None:
        """`write_parts` for a shard that is in memory."""
        self.write_parts(shard, [Part(rows=rows, labels=labels, skipped=skipped)])

    def write_parts(self, shard: int, parts: Iterable[Part]) -> None:
        """Write one shard atomically, with one part at a time in memory.

        Args:
            shard: its number.
            parts: the rows, labels and skipped items of the shard's span, in order.

        Raises:
            ValueError: counts or shapes do not fit the layout, or a value is not finite.
            DiskFull: no space left.
        """
        labels: list[int] = []
        skipped: list[str] = []
        sums: list[NDArray[np.float64]] = []
        each = math.prod(self.layout.shape) * np.dtype(STORED[self.layout.dtype]).itemsize
        with atomic_file(self._file(shard), len(self.layout.span(shard)) * each) as partial:
            with partial.open("wb") as file:
                self._write_header(file, 0)
                for part in parts:
                    rows = self._checked(shard, part)
                    labels += map(int, part.labels)
                    skipped += part.skipped
                    if self.layout.kind == "latents":
                        sums.append(_channel_sums(rows))
                    bits = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
                    file.write(bits.numpy().data)
                if len(labels) + len(skipped) != len(self.layout.span(shard)):
                    raise self._unfit(shard, (len(labels), *self.layout.shape), len(labels), len(skipped))
                file.seek(0)
                self._write_header(file, len(labels))  # same length as before: NumPy pads headers
            info: dict[str, Any] = {"rows": len(labels), "labels": labels, "skipped": skipped}
            if self.layout.kind == "latents":
                # Sums per row, so that the result does not depend on the parts.
                total = np.concatenate(sums).sum(axis=0) if sums else np.zeros((2, self.layout.shape[1]))
                positions = len(labels) * self.layout.shape[0] * math.prod(self.layout.shape[2:])
                info |= {"sum": total[0].tolist(), "square": total[1].tolist(), "count": [float(positions)]}
            info["sha256"] = file_hash(partial)
            write_json(self._file(shard).with_suffix(".json"), info)

    def finish(self) -> Shards:
        """Write labels and index. A second call changes nothing.

        Raises:
            ValueError: shards are missing, or every source item was skipped.
        """
        if missing := self.missing():
            raise ValueError(f"{self.folder} lacks {len(missing)} of {self.layout.num_shards} shards")
        if not (self.folder / "index.json").is_file():
            infos = read_infos(self.folder, self.layout.kind, self.layout.shape, self.layout.num_shards)
            if not any(info["rows"] for info in infos):
                raise ValueError(
                    f"{self.folder} would hold no rows: all {self.layout.sources} items were skipped"
                )
            labels = np.array([label for info in infos for label in info["labels"]], dtype=np.int64)
            with atomic_file(self.folder / "labels.npy") as partial, partial.open("wb") as file:
                np.save(file, labels)
            write_json(self.folder / "index.json", index_of(self.layout.as_header(), infos))
        return Shards(self.folder)

    def _checked(self, shard: int, part: Part) -> Tensor:
        if part.rows.shape != (len(part.labels), *self.layout.shape):
            raise self._unfit(shard, tuple(part.rows.shape), len(part.labels), len(part.skipped))
        rows = part.rows.to(TYPES[self.layout.dtype]).cpu().contiguous()
        if not rows.isfinite().all():
            raise ValueError(
                f"shard {shard} of {self.folder} would hold values that are not finite in "
                f"{self.layout.dtype}; the network that made them has diverged"
            )
        return rows

    def _unfit(self, shard: int, shape: tuple[int, ...], labels: int, skipped: int) -> ValueError:
        return ValueError(
            f"shard {shard} of {self.folder} must hold {len(self.layout.span(shard))} rows of "
            f"{self.layout.shape} with as many labels, got {shape}, {labels} labels and {skipped} skipped"
        )

    def _write_header(self, file: IO[bytes], rows: int) -> None:
        descr = np.lib.format.dtype_to_descr(np.dtype(STORED[self.layout.dtype]))
        header = {"descr": descr, "fortran_order": False, "shape": (rows, *self.layout.shape)}
        np.lib.format.write_array_header_1_0(file, header)

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"


def check_shard_folder(folder: Path, kind: str) -> None:
    """Raise ValueError if a folder holds files but no header.json; the message names the wanted `kind`."""
    # A process killed in write_json leaves only the partial file.
    known = {LOCK, "header.json", reserved(folder / "header.json", "partial").name}
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names <= known and "header.json" not in names:
        raise ValueError(f"{folder} is not empty and holds no {kind}; name a new folder")


@contextmanager
def shard_folder(folder: Path, layout: Layout) -> Iterator[ShardWriter]:
    """A `ShardWriter` that holds a lock on the folder. Raises ValueError if another process holds it."""
    check_shard_folder(folder, layout.kind)
    with locked(folder, "writing"):
        yield ShardWriter(folder, layout)


def write_shards(folder: Path, layout: Layout, parts: Callable[[range], Iterator[Part]]) -> Shards:
    """Write the missing shards, split over ranks; rank 0 creates and finalises the folder.

    Args:
        folder, layout: see `ShardWriter`.
        parts: from the span of a shard to its parts.

    Raises:
        ValueError: see `shard_folder` and `ShardWriter`.
    """
    with ExitStack() as stack:
        writer = processes.on_rank0(lambda: stack.enter_context(shard_folder(folder, layout)))
        missing = processes.broadcast(writer.missing())
        with processes.failing_together():
            for number in processes.rank_slice(len(missing)):
                writer.write_parts(missing[number], parts(layout.span(missing[number])))
        return processes.on_rank0(writer.finish)


def _channel_sums(rows: Tensor) -> NDArray[np.float64]:
    """Per-channel sum and sum of squares of rows (R, flips, C, h, w), float64, (R, 2, C)."""
    x = rows.double()
    return torch.stack([x.sum(dim=(1, 3, 4)), x.square().sum(dim=(1, 3, 4))], dim=1).numpy()


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], at: str = "") -> set[str]:
    changed: set[str] = set()
    for key in a.keys() | b.keys():
        old, new = a.get(key), b.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= _differing(old, new, f"{at}{key}.")
        elif key in ("images", "source") and fingerprints_agree(str(old), str(new)):
            continue
        elif old != new:
            changed.add(f"{at}{key} ({old} there, {new} now)" if len(f"{old}{new}") < 120 else f"{at}{key}")
    return changed
