"""Rows of one shape in memory-mapped shards: packed images, cached VFM features and cached latents.

header.json   what the rows are, written first: an interrupted writer goes on only where it agrees
00000.npy     rows of shard 0, renamed into place when whole
00000.json    its labels, checksum, sums and skipped files, written before the .npy
labels.npy    all labels
index.json    shards, statistics and attributes, written last: with it the folder is complete
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae.storage import file_hash, read_json, whole_file, write_json

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
        if header.is_file():
            begun = read_json(header)
            if begun != layout.as_header():
                changed = sorted(_differing(begun, layout.as_header()))
                raise ValueError(
                    f"{folder} was begun with another {', '.join(changed)}; delete the folder or name another"
                )
        else:
            # A kill inside write_json leaves its partial file, and nothing else.
            if folder.exists() and any(path.name != ".header.json.partial" for path in folder.iterdir()):
                raise ValueError(f"{folder} is not empty and holds no {layout.kind}; name a new folder")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(header, layout.as_header())

    def missing(self) -> list[int]:
        """Shards still to be written."""
        return [shard for shard in range(self.layout.num_shards) if not self._file(shard).is_file()]

    def write(self, shard: int, rows: Tensor, labels: Sequence[int], skipped: Sequence[str] = ()) -> None:
        """Write one shard, whole or not at all.

        Args:
            shard: its number.
            rows: (R, *shape), on any device; R + len(skipped) source items.
            labels: (R,) class indices.
            skipped: source items that could not be read.

        Raises:
            ValueError: the counts or shapes do not agree with the layout, or a value is not finite.
        """
        expected = len(self.layout.span(shard))
        if (
            len(rows) + len(skipped) != expected
            or len(labels) != len(rows)
            or rows.shape[1:] != self.layout.shape
        ):
            raise ValueError(
                f"shard {shard} must hold {expected} rows of {self.layout.shape} with as many labels, got "
                f"{tuple(rows.shape)}, {len(labels)} labels and {len(skipped)} skipped"
            )
        rows = rows.to(TYPES[self.layout.dtype]).cpu().contiguous()
        if not rows.isfinite().all():
            raise ValueError(
                f"shard {shard} of {self.folder} would hold values that are not finite in "
                f"{self.layout.dtype}; the network that made them has diverged"
            )
        info: dict[str, Any] = {"rows": len(rows), "labels": list(map(int, labels)), "skipped": list(skipped)}
        if self.layout.kind == "latents":
            info |= _channel_sums(rows)
        bits = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
        with whole_file(self._file(shard)) as partial:
            with partial.open("wb") as file:
                np.save(file, bits.numpy())
            info["sha256"] = file_hash(partial)
            write_json(self.folder / f"{shard:05d}.json", info)

    def finish(self) -> Shards:
        """Write labels and index. Calling it again changes nothing.

        Raises:
            ValueError: shards are missing, or every source item was skipped.
        """
        if missing := self.missing():
            raise ValueError(f"{self.folder} lacks {len(missing)} of {self.layout.num_shards} shards")
        if not (self.folder / "index.json").is_file():
            infos = [read_json(self.folder / f"{n:05d}.json") for n in range(self.layout.num_shards)]
            if not any(info["rows"] for info in infos):
                raise ValueError(
                    f"{self.folder} would hold no rows: all {self.layout.sources} items were skipped"
                )
            labels = np.array([label for info in infos for label in info["labels"]], dtype=np.int64)
            with whole_file(self.folder / "labels.npy") as partial, partial.open("wb") as file:
                np.save(file, labels)
            index: dict[str, Any] = self.layout.as_header() | {
                "rows": [info["rows"] for info in infos],
                "sha256": [info["sha256"] for info in infos],
                "skipped": [name for info in infos for name in info["skipped"]],
            }
            if self.layout.kind == "latents":
                index |= _statistics(infos)
            write_json(self.folder / "index.json", index)
        return Shards(self.folder)

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"


class Shards:
    """A complete folder of shards, read through memory maps.

    Args:
        folder: as `ShardWriter` left it.
        kind: what it must hold; None takes any.

    Raises:
        FileNotFoundError: nothing there, or an interrupted writer's folder.
        ValueError: it holds something else, or a shard is cut short.
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
        self.index = read_json(self.folder / "index.json")
        if kind is not None and self.index["kind"] != kind:
            raise ValueError(f"{self.folder} holds {self.index['kind']}, but {kind} are needed here")
        self.attributes: dict[str, Any] = self.index["attributes"]
        self.shape: tuple[int, ...] = tuple(self.index["shape"])
        self.dtype = TYPES[self.index["dtype"]]
        self.labels: NDArray[np.int64] = np.load(self.folder / "labels.npy")
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
        shards = np.searchsorted(self.ends, rows, side="right")
        locals_ = rows - np.concatenate([[0], self.ends])[shards]
        if versions is None:
            for i, (shard, row) in enumerate(zip(shards.tolist(), locals_.tolist(), strict=True)):
                out[i] = self._maps[shard][row]
        else:
            picks = zip(shards.tolist(), locals_.tolist(), versions.tolist(), strict=True)
            for i, (shard, row, version) in enumerate(picks):
                out[i] = self._maps[shard][row, version]
        tensor = torch.from_numpy(out)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor

    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the content: a hash of the shards' checksums and of the labels."""
        content = "".join(self.index["sha256"]).encode() + self.labels.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        # A process that reads data opens the maps anew: pickled, they would carry the whole content.
        return Shards, (self.folder,)

    def verify(self) -> None:
        """Read everything and compare it with the checksums.

        Raises:
            ValueError: a shard was changed or damaged; the message names it.
        """
        for number, expected in enumerate(self.index["sha256"]):
            if file_hash(self.folder / f"{number:05d}.npy") != expected:
                raise ValueError(
                    f"{self.folder / f'{number:05d}.npy'} is damaged: its checksum is not that of "
                    "index.json; "
                    "delete it together with index.json and run the command that made it again"
                )

    def _open(self, number: int, rows: int) -> NDArray[Any]:
        path = self.folder / f"{number:05d}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or missing: {error}") from None
        if array.shape != (rows, *self.shape):
            raise ValueError(f"{path} is damaged: it holds {array.shape}, not {(rows, *self.shape)}")
        plain: NDArray[Any] = array.view(np.ndarray)
        return plain  # a plain array: the memmap class costs a microsecond an access


def _channel_sums(rows: Tensor) -> dict[str, list[float]]:
    """Sum and sum of squares of (R, flips, C, h, w) per channel, in float64."""
    x = rows.double().transpose(1, 2)  # (R, C, flips, h, w)
    return {
        "sum": x.sum(dim=(0, 2, 3, 4)).tolist(),
        "square": x.square().sum(dim=(0, 2, 3, 4)).tolist(),
        "count": [float(x[:, 0].numel())],
    }


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
        elif old != new:
            changed.add(f"{at}{key} ({old} there, {new} now)" if len(f"{old}{new}") < 120 else f"{at}{key}")
    return changed
