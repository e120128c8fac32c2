"""Images on disk: a folder of files, or packed into shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from openpae.data.shards import Layout, Shards, ShardWriter

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class BrokenImage(ValueError):
    """An image file that can not be decoded; the message names it."""


class ImageSource(Protocol):
    """Labelled images by number."""

    classes: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls this image."""
        ...

    def read(self, index: int) -> Image.Image:
        """The image, RGB. Raises BrokenImage if it can not be decoded."""
        ...

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the data do."""
        ...


class ImageFolder:
    """Image files below a folder: one subfolder per class, or all in one (then one class "all").

    Args:
        root: the folder. Files are taken in the order of their names.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: images both in the folder and in subfolders, or a class without images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no image folder at {self.root}")
        flat = _images_in(self.root)
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = {folder.name: _images_below(folder) for folder in folders}
        if flat and any(found.values()):
            raise ValueError(
                f"{self.root} holds images both directly and in subfolders "
                f"({next(k for k in found if found[k])}); "
                "keep one subfolder per class, or all images in one folder"
            )
        if not flat and not any(found.values()):
            raise FileNotFoundError(
                f"no images in {self.root}; known endings: {' '.join(sorted(EXTENSIONS))}"
            )
        if not flat and (empty := [name for name, files in found.items() if not files]):
            raise ValueError(
                f"{self.root} has {len(empty)} class folders without images: {', '.join(empty[:5])}"
            )
        groups = {"all": flat} if flat else found
        self.classes = list(groups)
        self.files = [file for files in groups.values() for file in files]
        counts = [len(files) for files in groups.values()]
        self.labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Path below the root."""
        return self.files[index].relative_to(self.root).as_posix()

    def read(self, index: int) -> Image.Image:
        """The image, RGB. Raises BrokenImage if it can not be decoded."""
        return read_image(self.files[index])

    def fingerprint(self) -> str:
        """Over names and sizes of the files: quick, and changes with any replaced file of another size."""
        lines = (f"{self.name(i)} {file.stat().st_size}\n" for i, file in enumerate(self.files))
        return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()[:16]


class PackedImages:
    """Square uint8 images in shards, as `pack_images` writes them.

    Args:
        folder: a complete folder of packed images.

    Raises:
        FileNotFoundError, ValueError: as `Shards`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.shards = Shards(folder, kind="images")
        self.classes: list[str] = self.shards.attributes["classes"]
        self.labels = self.shards.labels
        self.image_size: int = self.shards.shape[-1]

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        """Folder and row."""
        return f"{self.shards.folder}[{index}]"

    def read(self, index: int) -> Image.Image:
        """The image, RGB."""
        row = self.shards.gather(np.array([index]))[0]
        return Image.fromarray(row.permute(1, 2, 0).numpy())

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
        """Over the source's and the rows."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self.rows}".encode()).hexdigest()[:16]


def open_images(path: str | Path) -> ImageFolder | PackedImages:
    """The images at a path, whichever of the two forms it is.

    Raises:
        FileNotFoundError, ValueError: nothing there, or unusable.
    """
    return PackedImages(path) if (Path(path) / "header.json").is_file() else ImageFolder(path)


def read_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        BrokenImage: it can not be decoded; the message names the file and the reason.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BrokenImage(f"{path} can not be decoded: {reason}") from None


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Scale so that the shorter side is `size`: halved by boxes while twice too large, then bicubic (as
    ADM)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    return image if scaled == image.size else image.resize(scaled, Image.Resampling.BICUBIC)


def crop(image: Image.Image, size: int, left: int, top: int) -> NDArray[np.uint8]:
    """A square of an RGB image as (3, size, size) uint8."""
    array = np.asarray(image)[top : top + size, left : left + size]
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The centre square after `resize_shorter`, (3, size, size) uint8: how images are cached and judged."""
    image = resize_shorter(image, size)
    return crop(image, size, (image.width - size) // 2, (image.height - size) // 2)


def pack_images(
    source: ImageSource,
    folder: Path,
    *,
    size: int,
    skip_broken: bool = False,
    per_shard: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> PackedImages:
    """Decode, centre-crop and pack images once, so that training reads them from a memory map.

    Args:
        source: the images.
        folder: where; an interrupted packing goes on.
        size: side of the packed images.
        skip_broken: leave out files that can not be decoded (their names are kept in index.json).
        per_shard: images per shard.
        progress: called with (done, all) images.

    Raises:
        BrokenImage: a file can not be decoded and skip_broken is off.
        ValueError: the folder holds something else.
    """
    layout = Layout(
        kind="images",
        dtype="uint8",
        shape=(3, size, size),
        sources=len(source),
        per_shard=per_shard,
        attributes={"classes": source.classes, "source": source.fingerprint()},
    )
    writer = ShardWriter(folder, layout)

    def read(index: int) -> NDArray[np.uint8] | str:
        try:
            return center_crop(source.read(index), size)
        except BrokenImage as error:
            if not skip_broken:
                raise BrokenImage(f"{error}; remove the file, or pass --skip-broken") from None
            return str(error)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for shard in writer.missing():
            span = layout.span(shard)
            results = list(pool.map(read, span))
            good = [i for i, result in zip(span, results, strict=True) if not isinstance(result, str)]
            pixels = [result for result in results if not isinstance(result, str)]
            broken = [result for result in results if isinstance(result, str)]
            rows = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 3, size, size)
            writer.write(shard, rows, source.labels[good].tolist(), broken)
            if progress:
                progress(span.stop, len(source))
    writer.finish()
    return PackedImages(folder)


def decode_batch(
    source: ImageSource, indices: Sequence[int], size: int, skip_broken: bool = False
) -> tuple[Tensor, list[int], list[str]]:
    """Centre-cropped images by number.

    Args:
        source: where they come from; packed images of this size are copied as they are.
        indices: which.
        size: side S.
        skip_broken: leave out files that can not be decoded.

    Returns:
        uint8 images (B, 3, S, S), the indices that they are of, and what was wrong with the others.

    Raises:
        BrokenImage: a file can not be decoded and skip_broken is off.
    """
    if isinstance(source, PackedImages) and source.image_size == size:
        return source.shards.gather(np.asarray(indices, dtype=np.int64)), list(indices), []
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    kept: list[int] = []
    broken: list[str] = []
    for index in indices:
        try:
            images[len(kept)] = torch.from_numpy(center_crop(source.read(index), size))
            kept.append(index)
        except BrokenImage as error:
            if not skip_broken:
                raise BrokenImage(f"{error}; remove the file, or pass --skip-broken") from None
            broken.append(str(error))
    return images[: len(kept)], kept, broken


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())


def _images_below(folder: Path) -> list[Path]:
    files: list[Path] = []
    seen: set[str] = set()
    for root, folders, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        files += _images_in(Path(root))
    return sorted(files)
