"""Rows of one shape in memory-mapped shards: packed images, cached VFM features and cached latents.

header.json   what the rows are, written first: an interrupted writer goes on only where it agrees
00000.npy     rows of shard 0, renamed into place when whole
00000.json    its labels, checksum, sums and skipped files, written before the .npy
labels.npy    all labels
index.json    shards, statistics and attributes, written last: with it the folder is complete

Opening a folder checks what costs nothing: that every shard has its size and type, and every label its class.
`Shards.verify` (pae info --verify) reads everything and finds any other damage by checksum.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae.storage.files import file_hash, fingerprints_agree, read_json, whole_file, write_json
from openpae.storage.outputs import LOCK, locked, make_folder

TYPES = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# NumPy has no bfloat16: its bits are kept as uint16.
_STORED = {"uint8": np.uint8, "float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the rows of a folder are."""

    kind: str
    """images, features, targets or latents."""
    dtype: str
    """uint8, float16, bfloat16 or float32."""
    shape: tuple[int, ...]
    """Of one row. Where rows come in several versions (flips), the first axis counts them."""
    sources: int
    """Source items; one that is skipped leaves no row."""
    per_shard: int
    """Source items per shard."""
    attributes: Mapping[str, Any]
    """What else must agree for the rows to be the same: fingerprints, sizes, class names."""

    @property
    def num_shards(self) -> int:
        """Shards of the complete folder."""
        return -(-self.sources // self.per_shard)

    def span(self, shard: int) -> range:
        """The source items of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.sources))

    def as_header(self) -> dict[str, Any]:
        """As header.json holds it."""
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "sources": self.sources,
            "per_shard": self.per_shard,
            "attributes": dict(self.attributes),
        }


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows of a shard, in order."""

    rows: Tensor
    """(R, *shape), on any device."""
    labels: Sequence[int]
    """(R,) class indices."""
    skipped: Sequence[str] = ()
    """Source items among these that could not be read."""


class ShardWriter:
    """Fill a folder shard by shard; what is there already is kept, so an interrupted writer goes on.

    Args:
        folder: where; made if absent.
        layout: what the rows are.

    Raises:
        ValueError: the folder was begun with another layout, or is not one of ours.
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
        """Shards still to be written."""
        return [shard for shard in range(self.layout.num_shards) if not self._file(shard).is_file()]

    def write(self, shard: int, rows: Tensor, labels: Sequence[int], skipped: Sequence[str] = ()) -> None:
        """Write one shard from rows that are all in memory; otherwise as `write_parts`."""
        self.write_parts(shard, [Part(rows=rows, labels=labels, skipped=skipped)])

    def write_parts(self, shard: int, parts: Iterable[Part]) -> None:
        """Write one shard, whole or not at all; of its parts, only one at a time need be in memory.

        Args:
            shard: its number.
            parts: together R rows and as many labels; R and the skipped items make up the layout's span.

        Raises:
            ValueError: the counts or shapes do not agree with the layout, or a value is not finite.
            DiskFull: there is no room for it.
        """
        labels: list[int] = []
        skipped: list[str] = []
        sums: list[NDArray[np.float64]] = []
        each = math.prod(self.layout.shape) * np.dtype(_STORED[self.layout.dtype]).itemsize
        with whole_file(self._file(shard), len(self.layout.span(shard)) * each) as partial:
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
                self._write_header(file, len(labels))  # as long as the first: NumPy leaves room in it
            info: dict[str, Any] = {"rows": len(labels), "labels": labels, "skipped": skipped}
            if self.layout.kind == "latents":
                # Summed row by row, so that it does not matter how the shard was cut into parts.
                total = np.concatenate(sums).sum(axis=0) if sums else np.zeros((2, self.layout.shape[1]))
                positions = len(labels) * self.layout.shape[0] * math.prod(self.layout.shape[2:])
                info |= {"sum": total[0].tolist(), "square": total[1].tolist(), "count": [float(positions)]}
            info["sha256"] = file_hash(partial)
            write_json(self._file(shard).with_suffix(".json"), info)

    def finish(self) -> Shards:
        """Write labels and index. Calling it again changes nothing.

        Raises:
            ValueError: shards are missing, or every source item was skipped.
        """
        if missing := self.missing():
            raise ValueError(f"{self.folder} lacks {len(missing)} of {self.layout.num_shards} shards")
        if not (self.folder / "index.json").is_file():
            infos = _read_infos(self.folder, self.layout.kind, self.layout.shape, self.layout.num_shards)
            if not any(info["rows"] for info in infos):
                raise ValueError(
                    f"{self.folder} would hold no rows: all {self.layout.sources} items were skipped"
                )
            labels = np.array([label for info in infos for label in info["labels"]], dtype=np.int64)
            with whole_file(self.folder / "labels.npy") as partial, partial.open("wb") as file:
                np.save(file, labels)
            write_json(self.folder / "index.json", _index_of(self.layout.as_header(), infos))
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
        descr = np.lib.format.dtype_to_descr(np.dtype(_STORED[self.layout.dtype]))
        header = {"descr": descr, "fortran_order": False, "shape": (rows, *self.layout.shape)}
        np.lib.format.write_array_header_1_0(file, header)

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"


def check_shard_folder(folder: Path, kind: str) -> None:
    """Refuse to fill a folder that is neither new nor ours.

    Raises:
        ValueError: it holds files, but no header.json; the message names the `kind` that it lacks.
    """
    # A kill inside write_json leaves its partial file, and nothing else.
    known = {LOCK, "header.json", ".header.json.partial"}
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names <= known and "header.json" not in names:
        raise ValueError(f"{folder} is not empty and holds no {kind}; name a new folder")


@contextmanager
def shard_folder(folder: Path, layout: Layout) -> Iterator[ShardWriter]:
    """`ShardWriter`, with the folder held against other processes.

    Raises:
        ValueError: see `ShardWriter`; or another process fills the folder.
    """
    check_shard_folder(folder, layout.kind)
    with locked(folder, "writing"):
        yield ShardWriter(folder, layout)


class Shards:
    """A complete folder of shards, read through memory maps.

    Args:
        folder: as `ShardWriter` left it.
        kind: what it must hold; None takes any.

    Raises:
        FileNotFoundError: nothing there, or an interrupted writer's folder.
        ValueError: it holds something else, a shard is cut short or of another type, or a label has no class.
    """

    def __init__(self, folder: str | Path, kind: str | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            begun = (self.folder / "header.json").is_file()
            state = (
                "is incomplete; run the command that made it again to finish it"
                if begun
                else "does not exist"
            )
            raise FileNotFoundError(f"{kind or 'shard'} folder {self.folder} {state}")
        self.index = _read_index(self.folder / "index.json")
        if kind is not None and self.index["kind"] != kind:
            raise ValueError(f"{self.folder} holds {self.index['kind']}, but {kind} are needed here")
        self.attributes: dict[str, Any] = self.index["attributes"]
        self.shape: tuple[int, ...] = tuple(self.index["shape"])
        self.dtype = TYPES[self.index["dtype"]]
        self.labels = self._open_labels()
        if kind == "latents" and not _has_statistics(self.index):
            reason = "latents need a tokenizer, and a finite mean and std for each channel"
            raise _damaged(self.folder / "index.json", reason)
        self.ends = np.cumsum(self.index["rows"])
        self._maps = [self._open(number, rows) for number, rows in enumerate(self.index["rows"])]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def gather(self, rows: NDArray[np.int64], versions: NDArray[np.int64] | None = None) -> Tensor:
        """Copy rows out.

        Args:
            rows: (B,) row numbers.
            versions: (B,) index into the first axis of each row, where rows come in versions.

        Returns:
            (B, *shape), or (B, *shape[1:]) with versions.
        """
        shape = self.shape if versions is None else self.shape[1:]
        out = np.empty((len(rows), *shape), dtype=_STORED[self.index["dtype"]])
        picked = itertools.repeat(...) if versions is None else versions.tolist()
        for target, row, version in zip(out, self.views(rows), picked, strict=False):
            target[...] = row[version]
        tensor = torch.from_numpy(out)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor

    def views(self, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """The memory maps of rows (B,), one `shape` each; read-only, nothing is copied."""
        shards = np.searchsorted(self.ends, rows, side="right")
        locals_ = rows - np.concatenate([[0], self.ends])[shards]
        for shard, row in zip(shards.tolist(), locals_.tolist(), strict=True):
            yield self._maps[shard][row]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the content: a hash of the shards' checksums and of the labels."""
        content = "".join(self.index["sha256"]).encode() + self.labels.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        # A process that reads data opens the maps anew: pickled, they would carry the whole content.
        return Shards, (self.folder,)

    def verify(self) -> None:
        """Read everything and compare it with the checksums, and what is written twice with itself.

        Raises:
            ValueError: a file was changed or damaged; the message names it.
        """
        for number, expected in enumerate(self.index["sha256"]):
            if file_hash(self.folder / f"{number:05d}.npy") != expected:
                raise _damaged(self.folder / f"{number:05d}.npy", "its checksum is not that of index.json")
        infos = _read_infos(self.folder, self.index["kind"], self.shape, len(self.index["rows"]))
        if self.labels.tolist() != [label for info in infos for label in info["labels"]]:
            raise _damaged(
                self.folder / "labels.npy", "its labels are not those that the shards were written with"
            )
        if self.index != _index_of(read_json(self.folder / "header.json"), infos):
            raise _damaged(
                self.folder / "index.json", "it does not agree with header.json and the shards' .json"
            )

    def _open(self, number: int, rows: int) -> NDArray[Any]:
        path = self.folder / f"{number:05d}.npy"
        array = _load(path, mmap_mode="r")
        if array.shape != (rows, *self.shape):
            raise _damaged(path, f"it holds {array.shape}, not {(rows, *self.shape)}")
        if array.dtype != _STORED[self.index["dtype"]] or not array.flags.c_contiguous:
            raise _damaged(path, f"it holds {array.dtype}, not {self.index['dtype']} row by row")
        plain: NDArray[Any] = array.view(np.ndarray)
        return plain  # a plain array: the memmap class costs a microsecond an access

    def _open_labels(self) -> NDArray[np.int64]:
        path = self.folder / "labels.npy"
        labels = _load(path)
        if labels.dtype != np.int64 or labels.shape != (sum(self.index["rows"]),):
            raise _damaged(
                path, f"it holds {labels.shape} {labels.dtype}, not {sum(self.index['rows'])} int64"
            )
        classes = len(self.attributes["classes"]) if "classes" in self.attributes else None
        if len(labels) and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
            allowed = "at least 0" if classes is None else f"0 to {classes - 1}"
            raise _damaged(path, f"labels must be {allowed}, got {labels.min()} to {labels.max()}")
        return labels


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except Exception as error:  # the bytes of a damaged header can lead NumPy's reader to any of them
        raise ValueError(f"{path} is damaged or missing: {error}; {_HOW_TO_REPAIR}") from None
    return array


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}; {_HOW_TO_REPAIR}")


_HOW_TO_REPAIR = "delete it together with index.json and run the command that made it again"


def _read_infos(folder: Path, kind: str, shape: Sequence[int], count: int) -> list[dict[str, Any]]:
    """What the .json of each shard says of it."""
    sums = {"sum": shape[1], "square": shape[1], "count": 1} if kind == "latents" else {}
    infos = []
    for number in range(count):
        path = folder / f"{number:05d}.json"
        info = _with_keys(path, rows=int, labels=list, skipped=list, sha256=str, **dict.fromkeys(sums, list))
        if any(list(map(type, info[name])) != [float] * length for name, length in sums.items()):
            raise _damaged(path, f"its {', '.join(sums)} are not one number per channel")
        infos.append(info)
    return infos


def _read_index(path: Path) -> dict[str, Any]:
    kinds = {"kind": str, "dtype": str, "shape": list, "attributes": dict, "rows": list, "sha256": list}
    index = _with_keys(path, skipped=list, **kinds)
    whole = all(type(number) is int and number >= 0 for number in (*index["rows"], *index["shape"]))
    named = type(index["attributes"].get("classes", [])) is list
    if index["dtype"] not in TYPES or len(index["rows"]) != len(index["sha256"]) or not whole or not named:
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


def _with_keys(path: Path, **kinds: type) -> dict[str, Any]:
    data = read_json(path)
    if wrong := [name for name, kind in kinds.items() if type(data.get(name)) is not kind]:
        raise _damaged(path, f"it has no fitting {', '.join(sorted(wrong))}")
    return data


def _index_of(header: Mapping[str, Any], infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    index: dict[str, Any] = {
        **header,
        "rows": [info["rows"] for info in infos],
        "sha256": [info["sha256"] for info in infos],
        "skipped": [name for info in infos for name in info["skipped"]],
    }
    return index | _statistics(infos) if header.get("kind") == "latents" else index


def _channel_sums(rows: Tensor) -> NDArray[np.float64]:
    """Sum and sum of squares of each row of (R, flips, C, h, w) per channel, in float64: (R, 2, C)."""
    x = rows.double()
    return torch.stack([x.sum(dim=(1, 3, 4)), x.square().sum(dim=(1, 3, 4))], dim=1).numpy()


def _statistics(infos: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    count = sum(info["count"][0] for info in infos)
    mean = np.sum([info["sum"] for info in infos], axis=0) / count
    variance = np.sum([info["square"] for info in infos], axis=0) / count - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(variance.clip(min=0)).tolist()}


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
