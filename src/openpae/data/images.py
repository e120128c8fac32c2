"""Sources of labelled images: a folder of files, packed shards, another form, or a subset of one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openpae.data.crops import Size, height_width
from openpae.data.decode import read_image
from openpae.data.fingerprints import folder_fingerprint
from openpae.data.forms import is_remote, open_form
from openpae.data.listing import image_names
from openpae.data.records import StoredImages
from openpae.data.shards import Shards


class ImageSource(Protocol):
    """Labelled images, by index."""

    classes: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of this image in messages."""
        ...

    def read(self, index: int) -> Image.Image:
        """The image, RGB. Raises BrokenImage if it cannot be decoded."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal digits that change with the data; compare them with `fingerprints_agree`."""
        ...


class ImageFolder:
    """Image files in a folder: one subfolder per class, or no subfolders and one class "all".

    Args:
        root: the folder. Files are sorted by name.
        full_hash: hash every byte of every file for the fingerprint, not only a few kilobytes.

    Raises:
        FileNotFoundError, ValueError, PermissionError: as `listing.image_names`.
    """

    def __init__(self, root: str | Path, *, full_hash: bool = False) -> None:
        self.root, self.full_hash = Path(root), full_hash
        groups = image_names(self.root)
        self.classes = list(groups)
        self.names = [name for names in groups.values() for name in names]
        counts = [len(names) for names in groups.values()]
        self.labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path relative to the root."""
        return self.names[index]

    def read(self, index: int) -> Image.Image:
        """The image, RGB. Raises BrokenImage if it cannot be decoded."""
        return read_image(self.root / self.names[index])

    def fingerprint(self) -> str:
        """See `fingerprints.folder_fingerprint`."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return folder_fingerprint(self.root, self.names, full_hash=self.full_hash)


class PackedImages:
    """uint8 images of one size in shards, as written by `pack_images`. Raises the errors of `Shards`."""

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
        self,
        rows: NDArray[np.int64],
        size: Size,
        lefts: NDArray[np.int64],
        tops: NDArray[np.int64],
        flips: NDArray[np.bool_],
    ) -> Tensor:
        """Crop the images at `rows` (B,) straight from the memory map: uint8, (B, 3, H, W).

        `lefts` and `tops` are the first column and row of each crop, `flips` says which are mirrored: (B,).
        """
        height, width = height_width(size)
        out = np.empty((len(rows), 3, height, width), dtype=np.uint8)
        images = torch.from_numpy(out)
        corners = zip(self.shards.views(rows), lefts.tolist(), tops.tolist(), flips.tolist(), strict=True)
        for i, (image, left, top, flip) in enumerate(corners):
            out[i] = image[:, top : top + height, left : left + width]
            if flip:  # at once, while the crop is in the CPU cache
                images[i] = images[i].flip(-1)
        return images

    def fingerprint(self) -> str:
        """Hash of the shards' checksums and of the labels."""
        return self.shards.fingerprint()


class Subset:
    """The images of a source at the indices `rows`, in order."""

    def __init__(self, source: ImageSource, rows: Sequence[int]) -> None:
        self.source, self.rows = source, list(rows)
        self.classes, self.labels = source.classes, source.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """See the source."""
        return self.source.name(self.rows[index])

    def read(self, index: int) -> Image.Image:
        """See the source."""
        return self.source.read(self.rows[index])

    def fingerprint(self) -> str:
        """Hash of each part of the source's fingerprint, with the rows."""
        parts = [f"{part} {self.rows}".encode() for part in self.source.fingerprint().split(".")]
        return ".".join(hashlib.sha256(part).hexdigest()[:16] for part in parts)


def open_images(path: str | Path, *, full_hash: bool = False) -> ImageSource:
    """Open packed images if the path holds a header.json, else as `open_source`, for reading in any order.

    Raises:
        FileNotFoundError, ValueError, PermissionError, ModuleNotFoundError: see `open_source`; or the images
            can only be read in order.
    """
    if (Path(path) / "header.json").is_file():
        return PackedImages(path)
    source = open_source(path, full_hash=full_hash)
    if isinstance(source, StoredImages) and not source.at_random:
        raise ValueError(f"{path} can only be read in order; pack it first: pae pack {path} OUT")
    return source


def open_source(path: str | Path, *, full_hash: bool = False) -> ImageFolder | StoredImages:
    """Open images as they come: one of the forms of `forms.open_form`, or a folder of image files.

    `full_hash` and the errors are those of `ImageFolder` and `forms.open_form`.
    """
    return open_form(Path(path), full_hash=full_hash) or ImageFolder(path, full_hash=full_hash)


def place_of(path: Path) -> Path:
    """The file or folder of a path that may name a part of it (`FOLDER#LABELFILE`), or shards (`{0..9}`)."""
    if path.exists() or is_remote(path):
        return path
    base = str(path).split("#")[0]
    return Path(base).parent if "{" in base else Path(base)


def chosen_rows(source: ImageSource, count: int) -> NDArray[np.int64]:
    """Sorted indices of the images that metrics use: `count` evenly spread ones, or all."""
    return spread(len(source), count)


def spread(total: int, count: int) -> NDArray[np.int64]:
    """`count` evenly spread indices below `total`, or all: sorted images then cover every class evenly."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
