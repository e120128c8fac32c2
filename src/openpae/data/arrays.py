"""Images of npz files: an array of uint8 pixels, and one of labels."""

from __future__ import annotations

import math
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openpae.data.npz import npz_array, npz_entry, npz_keys
from openpae.data.records import (
    ByteRanges,
    Reader,
    StoredImages,
    as_rgb,
    check_size,
    class_names_beside,
    class_numbers,
    read_span,
)

_IMAGES = ("images", "arr_0", "x")
_LABELS = ("labels", "arr_1", "y")
_CLASSES = "classes"


def open_npz(path: Path, part: str | None = None, *, full_hash: bool = False) -> StoredImages:
    """Images of an npz file: `images` (N, H, W, 3), uint8, grey without the last axis; `labels` (N,).

    ADM's names arr_0 and arr_1 are known, too. `classes` are the names of the labels, (K,) text. A compressed
    file can only be read in order.

    Args:
        path: the file.
        part: prefix of the names: `train` for train_images and train_labels.
        full_hash: see `StoredImages`.

    Raises:
        FileNotFoundError: no images in it.
        ValueError: an array is missing or damaged, or has another type or shape.
    """
    prefix = f"{part}_" if part else ""
    keys = npz_keys(path)
    image_key = next((prefix + name for name in _IMAGES if prefix + name in keys), prefix + _IMAGES[0])
    with npz_entry(path, image_key) as (file, (shape, fortran, dtype)):
        skip = file.tell()
    allowed = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if fortran or dtype != np.uint8 or not allowed or 0 in shape[1:]:
        raise ValueError(
            f"{image_key} in {path} must be uint8 images (N, H, W, 3) or (N, H, W), got {dtype} {shape}"
        )
    if not shape[0]:
        raise FileNotFoundError(f"no images in {path}")
    check_size(path, "images", math.prod(shape[1:]))
    labels, classes = _labels(path, prefix, keys, shape[0])
    names = [f"{row:06d}" for row in range(shape[0])]
    reader = _reader(path, image_key, shape, skip)
    return StoredImages(path, reader, names, labels, classes, full_hash=full_hash)


def _labels(path: Path, prefix: str, keys: set[str], count: int) -> tuple[NDArray[np.int64], list[str]]:
    key = next((prefix + name for name in _LABELS if prefix + name in keys), None)
    if key is None:
        return np.zeros(count, dtype=np.int64), ["all"]
    labels = npz_array(path, key, kinds="iuU")
    if labels.size != count or labels.ndim > 2 or count not in labels.shape:
        raise ValueError(f"{key} in {path} must hold {count:,} labels, got {labels.shape}")
    names = npz_array(path, _CLASSES, kinds="U").ravel().tolist() if _CLASSES in keys else None
    return class_numbers(path, labels.ravel().tolist(), names or class_names_beside(path.parent))


def _reader(path: Path, key: str, shape: tuple[int, ...], skip: int) -> Reader:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
        checksums = [entry.CRC for entry in archive.infolist()]
    if info.compress_type != zipfile.ZIP_STORED:
        return ArrayInOrder(path, key, shape, checksums)
    head = read_span(path, info.header_offset, 30)
    lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    size = math.prod(shape[1:])
    starts = info.header_offset + 30 + lengths + skip + np.arange(shape[0], dtype=np.int64) * size
    numbers, sizes = np.zeros(shape[0], dtype=np.int64), np.full(shape[0], size, dtype=np.int64)
    return ByteRanges([path], numbers, starts, sizes, shape[1:])


class ArrayInOrder:
    """A `Reader` of a compressed array, whose rows must be read in order, up to a few that overtake others.

    Args:
        path: the npz file.
        key: the array.
        shape: its shape.
        checksums: those of the arrays in the file.
    """

    at_random = False

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], checksums: list[int]) -> None:
        self.files, self.key, self.shape, self.checksums = [path], key, shape, checksums
        self._lock = threading.Lock()
        self._stream: Iterator[bytes] | None = None
        self._next = 0
        self._waiting: dict[int, bytes] = {}

    def load(self, index: int) -> NDArray[np.uint8]:
        """See `Reader`."""
        with self._lock:
            if self._stream is None or (index < self._next and index not in self._waiting):
                self._stream, self._next, self._waiting = self._rows(), 0, {}
            while self._next <= index:
                self._waiting[self._next] = next(self._stream)
                self._next += 1
            data = self._waiting.pop(index)
            for row in [row for row in self._waiting if row < index - 2 * _AHEAD]:  # nobody reads them
                del self._waiting[row]
        return as_rgb(np.frombuffer(data, np.uint8).reshape(self.shape[1:]))

    def _rows(self) -> Iterator[bytes]:
        size = math.prod(self.shape[1:])
        with npz_entry(self.files[0], self.key) as (file, _):
            for _ in range(self.shape[0]):
                data = file.read(size)
                if len(data) < size:
                    raise ValueError("it ends early")
                yield data

    def samples(self) -> Iterator[bytes]:
        """See `Reader`. The file keeps a checksum of every array."""
        yield repr(self.checksums).encode()


_AHEAD = 64
"""Images that `packing.in_order` reads ahead."""
