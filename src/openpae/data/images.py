"""Images on disk: a folder of files, or packed into shards."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openpae.data.crops import Size, height_width
from openpae.data.decode import read_image
from openpae.data.listing import image_names
from openpae.data.shards import Shards

R = TypeVar("R")
T = TypeVar("T")

SEEN = 2048
"""Bytes at the beginning, in the middle and at the end of each file that a folder's fingerprint covers."""


class ImageSource(Protocol):
    """Labelled images by number."""

    classes: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls this image."""
        ...

    def read(self, index: int) -> Image.Image:
        """The image, RGB. Raises BrokenImage if it cannot be decoded."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal digits that change when the data do; compare them with `fingerprints_agree`."""
        ...


class ImageFolder:
    """Image files below a folder: one subfolder per class, or all in one (then one class "all").

    Args:
        root: the folder. Files are taken in the order of their names.
        whole: let the fingerprint cover all of every file, and not only a few kilobytes.

    Raises:
        FileNotFoundError, ValueError, PermissionError: as `listing.image_names`.
    """

    def __init__(self, root: str | Path, *, whole: bool = False) -> None:
        self.root, self.whole = Path(root), whole
        groups = image_names(self.root)
        self.classes = list(groups)
        self.names = [name for names in groups.values() for name in names]
        counts = [len(names) for names in groups.values()]
        self.labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path below the root."""
        return self.names[index]

    def read(self, index: int) -> Image.Image:
        """The image, RGB. Raises BrokenImage if it cannot be decoded."""
        return read_image(self.root / self.names[index])

    def fingerprint(self) -> str:
        """Parts of 16 digits: over names and sizes, over a few kilobytes of each file, and with `whole` over
        all of it. The times of the files do not count: a copy keeps its caches."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digests = [hashlib.sha256() for _ in range(3 if self.whole else 2)]
        with ThreadPoolExecutor(max_workers=16) as pool:  # a network disk answers many at once
            for name, (size, *hashes) in zip(self.names, in_order(pool, self._file, self.names), strict=True):
                digests[0].update(os.fsencode(f"{name} {size}\n"))
                for digest, content in zip(digests[1:], hashes, strict=True):
                    digest.update(content)
        return ".".join(digest.hexdigest()[:16] for digest in digests)

    def _file(self, name: str) -> tuple[int, *tuple[bytes, ...]]:
        """Size, hash of the first, middle and last `SEEN` bytes, and where it is asked for of all."""
        with open(os.path.join(self.root, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            parts = hashlib.sha256()
            for start in sorted({0, max(0, (size - SEEN) // 2), max(0, size - SEEN)}):
                file.seek(start)
                parts.update(file.read(SEEN))
            file.seek(0)
            content = (hashlib.file_digest(file, "sha256").digest(),) if self.whole else ()
        return size, parts.digest(), *content


class PackedImages:
    """uint8 images of one size in shards, as `pack_images` writes them.

    Args:
        folder: a complete folder of packed images.

    Raises:
        FileNotFoundError, ValueError: as `Shards`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.shards = Shards(folder, kind="images")
        self.classes: list[str] = self.shards.attributes["classes"]
        self.labels = self.shards.labels
        self.image_shape: tuple[int, int] = (self.shards.shape[-2], self.shards.shape[-1])

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        """Folder and row."""
        return f"{self.shards.folder}[{index}]"

    def read(self, index: int) -> Image.Image:
        """The image, RGB."""
        row = self.shards.gather(np.array([index]))[0]
        return Image.fromarray(row.permute(1, 2, 0).numpy())

    def cut(
        self, rows: NDArray[np.int64], size: Size, lefts: NDArray[np.int64], tops: NDArray[np.int64]
    ) -> Tensor:
        """Parts of images (B,), copied straight from the memory map: uint8, (B, 3, H, W).

        Column and row at which each part begins are (B,).
        """
        height, width = height_width(size)
        out = np.empty((len(rows), 3, height, width), dtype=np.uint8)
        corners = zip(self.shards.views(rows), lefts.tolist(), tops.tolist(), strict=True)
        for i, (image, left, top) in enumerate(corners):
            out[i] = image[:, top : top + height, left : left + width]
        return torch.from_numpy(out)

    def fingerprint(self) -> str:
        """Over the checksums of the shards."""
        return self.shards.fingerprint()


class Subset:
    """Some images of a source, by number.

    Args:
        source: where they come from.
        rows: which, in order.
    """

    def __init__(self, source: ImageSource, rows: Sequence[int]) -> None:
        self.source, self.rows = source, list(rows)
        self.classes, self.labels = source.classes, source.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """As in the source."""
        return self.source.name(self.rows[index])

    def read(self, index: int) -> Image.Image:
        """As in the source."""
        return self.source.read(self.rows[index])

    def fingerprint(self) -> str:
        """Over the source's, part by part, and the rows."""
        parts = [f"{part} {self.rows}".encode() for part in self.source.fingerprint().split(".")]
        return ".".join(hashlib.sha256(part).hexdigest()[:16] for part in parts)


def open_images(path: str | Path, *, whole: bool = False) -> ImageFolder | PackedImages:
    """The images at a path, whichever of the two forms it is.

    Args:
        path: where.
        whole: of a folder of files, see `ImageFolder`; packed images have the checksum of every shard.

    Raises:
        FileNotFoundError, ValueError: nothing there, or unusable.
    """
    packed = (Path(path) / "header.json").is_file()
    return PackedImages(path) if packed else ImageFolder(path, whole=whole)


def chosen_rows(source: ImageSource, count: int) -> NDArray[np.int64]:
    """Which images are measured: `count` of the source, evenly spread, or all of them; in order."""
    return spread(len(source), count)


def spread(total: int, count: int) -> NDArray[np.int64]:
    """`count` of the numbers below `total`, evenly spread, so that every class has its share; or all."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int = 64
) -> Iterator[R]:
    """As pool.map, but never more than `ahead` results wait: a shard of decoded images may not fit memory."""
    todo = iter(items)
    pending: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(todo, ahead))
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(function, item) for item in islice(todo, 1))
