"""Rows of one shape in memory-mapped shards: packed images, cached features, targets and latents, samples.

header.json   layout of the rows, written first; a writer resumes only if it agrees
00000.npy     rows of shard 0, renamed into place when complete
00000.json    its labels, checksum, sums and skipped files, written before the .npy
labels.npy    all labels
index.json    shards, statistics and attributes, written last; a folder with it is complete

Opening a folder checks the size and type of every shard and the range of the labels. `Shards.verify`
(pae info --verify) reads all files and finds any other damage by checksum.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae.storage.files import file_hash, read_fields, read_json

TYPES = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
STORED = {"uint8": np.uint8, "float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
"""NumPy type of each dtype on disk. NumPy has no bfloat16, so its bits are stored as uint16."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Type, shape and number of the rows of a folder."""

    kind: str
    """images, features, targets, latents or samples."""
    dtype: str
    """uint8, float16, bfloat16 or float32."""
    shape: tuple[int, ...]
    """Shape of one row. If rows have several versions (flips), the first axis counts them."""
    sources: int
    """Number of source items; a skipped item has no row."""
    per_shard: int
    """Source items per shard."""
    attributes: Mapping[str, Any]
    """Everything else that determines the rows: fingerprints, sizes, class names."""

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete folder."""
        return -(-self.sources // self.per_shard)

    def span(self, shard: int) -> range:
        """Indices of a shard's source items."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.sources))

    def as_header(self) -> dict[str, Any]:
        """The content of header.json."""
        return asdict(self) | {"shape": list(self.shape), "attributes": dict(self.attributes)}


class Shards:
    """A complete folder of shards, read through memory maps.

    Args:
        folder: a folder written by `ShardWriter`.
        kind: required kind of the rows; None accepts any.

    Raises:
        FileNotFoundError: no such folder, or an incomplete one.
        ValueError: the rows are of another kind, a shard has the wrong size or type, or a label has no class.
    """

    def __init__(self, folder: str | Path, kind: str | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            begun = (self.folder / "header.json").is_file()
            repair = "is incomplete; run the command that made it again to finish it"
            state = repair if begun else "does not exist"
            raise FileNotFoundError(f"{kind or 'shard'} folder {self.folder} {state}")
        self.index = _read_index(self.folder / "index.json")
        if kind is not None and self.index["kind"] != kind:
            raise ValueError(f"{self.folder} holds {self.index['kind']}, but {kind} are needed here")
        self.attributes: dict[str, Any] = self.index["attributes"]
        self.shape: tuple[int, ...] = tuple(self.index["shape"])
        self.dtype = TYPES[self.index["dtype"]]
        self.labels = self._open_labels()
        if self.index["kind"] == "latents" and not _has_statistics(self.index):
            reason = "latents need a tokenizer, and a finite mean and std for each channel"
            raise _damaged(self.folder / "index.json", reason)
        self.ends = np.cumsum(self.index["rows"])
        self._maps = [self._open(number, rows) for number, rows in enumerate(self.index["rows"])]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def gather(self, rows: NDArray[np.int64], versions: NDArray[np.int64] | None = None) -> Tensor:
        """Copy rows into a tensor.

        Args:
            rows: (B,) row numbers.
            versions: (B,) index into the first axis of each row, if rows have versions.

        Returns:
            (B, *shape), or (B, *shape[1:]) with versions.
        """
        shape = self.shape if versions is None else self.shape[1:]
        out = np.empty((len(rows), *shape), dtype=STORED[self.index["dtype"]])
        picked = itertools.repeat(...) if versions is None else versions.tolist()
        for target, row, version in zip(out, self.views(rows), picked, strict=False):
            target[...] = row[version]
        tensor = torch.from_numpy(out)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor

    def views(self, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Read-only views of the memory maps of rows (B,), each of shape `shape`."""
        shards = np.searchsorted(self.ends, rows, side="right")
        locals_ = rows - np.concatenate([[0], self.ends])[shards]
        for shard, row in zip(shards.tolist(), locals_.tolist(), strict=True):
            yield self._maps[shard][row]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a hash over the shards' checksums and the labels."""
        content = "".join(self.index["sha256"]).encode() + self.labels.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        # Pickled memory maps would carry their content, so another process opens the folder again.
        return Shards, (self.folder,)

    def verify(self) -> None:
        """Compare all files with their checksums, and values stored twice with each other.

        Raises:
            ValueError: a file is damaged; the message names it.
        """
        for number, expected in enumerate(self.index["sha256"]):
            if file_hash(self.folder / f"{number:05d}.npy") != expected:
                raise _damaged(self.folder / f"{number:05d}.npy", "its checksum is not that of index.json")
        infos = read_infos(self.folder, self.index["kind"], self.shape, len(self.index["rows"]))
        if self.labels.tolist() != [label for info in infos for label in info["labels"]]:
            raise _damaged(self.folder / "labels.npy", "its labels do not agree with the shards' .json")
        if self.index != index_of(read_json(self.folder / "header.json"), infos):
            reason = "it does not agree with header.json and the shards' .json"
            raise _damaged(self.folder / "index.json", reason)

    def _open(self, number: int, rows: int) -> NDArray[Any]:
        path = self.folder / f"{number:05d}.npy"
        array = _load(path, mmap_mode="r")
        if array.shape != (rows, *self.shape):
            raise _damaged(path, f"it holds {array.shape}, not {(rows, *self.shape)}")
        if array.dtype != STORED[self.index["dtype"]] or not array.flags.c_contiguous:
            raise _damaged(path, f"it holds {array.dtype}, not {self.index['dtype']} row by row")
        plain: NDArray[Any] = array.view(np.ndarray)
        return plain  # np.memmap costs a microsecond more per access

    def _open_labels(self) -> NDArray[np.int64]:
        path = self.folder / "labels.npy"
        labels = _load(path)
        if labels.dtype != np.int64 or labels.shape != (sum(self.index["rows"]),):
            reason = f"it holds {labels.shape} {labels.dtype}, not {sum(self.index['rows'])} int64"
            raise _damaged(path, reason)
        classes = len(self.attributes["classes"]) if "classes" in self.attributes else None
        if len(labels) and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
            allowed = "at least 0" if classes is None else f"0 to {classes - 1}"
            raise _damaged(path, f"labels must be {allowed}, got {labels.min()} to {labels.max()}")
        return labels


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except Exception as error:  # a damaged header can raise any error
        raise ValueError(f"{path} is damaged or missing: {error}; {_HOW_TO_REPAIR}") from None
    return array


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}; {_HOW_TO_REPAIR}")


_HOW_TO_REPAIR = "delete it together with index.json and run the command that made it again"


def read_infos(folder: Path, kind: str, shape: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Content of the .json file of each shard."""
    sums = {"sum": shape[1], "square": shape[1], "count": 1} if kind == "latents" else {}
    infos = []
    for number in range(count):
        path = folder / f"{number:05d}.json"
        info = _fields(path, rows=int, labels=list, skipped=list, sha256=str, **dict.fromkeys(sums, list))
        if any(list(map(type, info[name])) != [float] * length for name, length in sums.items()):
            raise _damaged(path, f"its {', '.join(sums)} are not one number per channel")
        infos.append(info)
    return infos


def _read_index(path: Path) -> dict[str, Any]:
    kinds = {"kind": str, "dtype": str, "shape": list, "attributes": dict, "rows": list, "sha256": list}
    index = _fields(path, skipped=list, **kinds)
    counted = all(type(number) is int and number >= 0 for number in (*index["rows"], *index["shape"]))
    named = type(index["attributes"].get("classes", [])) is list
    if index["dtype"] not in TYPES or len(index["rows"]) != len(index["sha256"]) or not counted or not named:
        raise _damaged(path, "its types, rows and checksums do not make up shards")
    return index


def _has_statistics(index: Mapping[str, Any]) -> bool:
    channels = index["shape"][1] if len(index["shape"]) == 4 else None
    values = [index.get("mean"), index.get("std")]
    return isinstance(index["attributes"].get("tokenizer"), str) and all(
        isinstance(value, list)
        and len(value) == channels
        and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
        for value in values
    )


def _fields(path: Path, **kinds: type) -> dict[str, Any]:
    try:
        return read_fields(path, **kinds)
    except ValueError as error:
        raise ValueError(f"{error}; {_HOW_TO_REPAIR}") from None


def index_of(header: Mapping[str, Any], infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Content of index.json, from the header and the .json of each shard."""
    index: dict[str, Any] = {
        **header,
        "rows": [info["rows"] for info in infos],
        "sha256": [info["sha256"] for info in infos],
        "skipped": [name for info in infos for name in info["skipped"]],
    }
    return index | _statistics(infos) if header.get("kind") == "latents" else index


def _statistics(infos: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    count = sum(info["count"][0] for info in infos)
    mean = np.sum([info["sum"] for info in infos], axis=0) / count
    variance = np.sum([info["square"] for info in infos], axis=0) / count - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(variance.clip(min=0)).tolist()}
