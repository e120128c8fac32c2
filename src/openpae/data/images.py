"""Images on disk: a folder of files, or packed into shards."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from openpae.data.colour import UnreadProfile, shown
from openpae.data.fingerprints import MACHINE_ERRORS, folder_fingerprint
from openpae.data.listing import image_names
from openpae.data.shards import Layout, Part, Shards, shard_folder

R = TypeVar("R")
T = TypeVar("T")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, told by content and not by name. Pillow knows more, but its EPS starts Ghostscript."""
MAX_ASPECT = 100
"""Largest ratio of an image's sides: 1 x 60,000 pixels would fill gigabytes once the short side is 256."""

Size = int | tuple[int, int]
"""Height and width in pixels, or the side of a square."""


class BrokenImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


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
        """As `fingerprints.folder_fingerprint`."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return folder_fingerprint(self.root, self.names, whole=self.whole)


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


def read_image(path: Path) -> Image.Image:
    """Decode a still image to RGB as viewers show it: upright, in sRGB, transparent parts on white.

    16 bits become 8 by their upper half. The content says which format it is, whatever the name says. A
    colour profile that cannot be used is an `UnreadProfile` warning.

    Raises:
        BrokenImage: it cannot be decoded, or not without a guess: animated, 32-bit pixels of unknown range,
            sides of more than 100 to 1, or more pixels than Pillow takes for honest (178,956,970). The
            message names the file and the reason.
    """
    image, fault = decoded(path, _checked)
    if fault:
        text = f"the colour profile of {path} cannot be used: {fault}; its numbers are taken as sRGB"
        warnings.warn(text, UnreadProfile, stacklevel=2)
    return image


def decoded(path: Path, convert: Callable[[Image.Image], R]) -> R:
    """What a function makes of an image file.

    Raises:
        BrokenImage: the file cannot be decoded, or the function raises; the message names the file.
        MemoryError, OSError: memory or file handles ran out, which is no fault of the file.
    """
    try:
        # Opened here, as Pillow leaves a file open that it cannot read from.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            return convert(image)
    except UnidentifiedImageError:
        reason = f"no known image format ({' '.join(FORMATS)})"
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        reason = error.strerror or str(error)
    except MemoryError:
        raise MemoryError(f"out of memory at {path}") from None
    except Exception as error:  # the bytes of a damaged file can lead a decoder to any of them
        reason = str(error) or type(error).__name__
    raise BrokenImage(f"{path} cannot be decoded: {reason}")


def _checked(image: Image.Image) -> tuple[Image.Image, str]:
    # A phone's MPO holds further views or a gain map behind the picture that every viewer shows.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError(f"it has {image.n_frames} frames or pages, save one as a still image")  # type: ignore[attr-defined]
    if max(image.size) > MAX_ASPECT * min(image.size):
        sides = f"{image.width} x {image.height}"
        raise ValueError(f"its sides are {sides} pixels, more than {MAX_ASPECT} to 1; crop it")
    return shown(image)


def height_width(size: Size) -> tuple[int, int]:
    """(H, W) of a size."""
    return (size, size) if isinstance(size, int) else size


def plain_size(size: Size) -> int | list[int]:
    """As a header or a record says it: one number for a square, else height and width."""
    height, width = height_width(size)
    return height if height == width else [height, width]


def resize_to_cover(image: Image.Image, size: Size) -> Image.Image:
    """Scale in proportion to the smallest size that covers H x W; of a square, the shorter side fits.

    Halved by boxes while twice too large, then bicubic (as ADM).
    """
    height, width = height_width(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    scaled = (round(image.width * scale), round(image.height * scale))
    return image if scaled == image.size else image.resize(scaled, Image.Resampling.BICUBIC)


def covers(shape: tuple[int, int], size: Size) -> bool:
    """Whether `resize_to_cover` leaves an image of this (H, W) as it is."""
    height, width = height_width(size)
    return max(height / shape[0], width / shape[1]) == 1


def crop(image: Image.Image, size: Size, left: int, top: int) -> NDArray[np.uint8]:
    """A part of an RGB image as (3, H, W) uint8."""
    height, width = height_width(size)
    array = np.asarray(image)[top : top + height, left : left + width]
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def center_crop(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    """The centre after `resize_to_cover`, (3, H, W) uint8: how images are cached and judged."""
    height, width = height_width(size)
    image = resize_to_cover(image, size)
    return crop(image, size, (image.width - width) // 2, (image.height - height) // 2)


def pack_images(
    source: ImageSource,
    folder: Path,
    *,
    size: Size,
    skip_broken: bool = False,
    per_shard: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> PackedImages:
    """Decode, centre-crop and pack images once, so that training reads them from a memory map.

    Args:
        source: the images.
        folder: where; an interrupted packing goes on.
        size: of the packed images.
        skip_broken: leave out files that cannot be decoded (their names are kept in index.json).
        per_shard: images per shard.
        progress: called with (done, all) images.

    Raises:
        BrokenImage: a file cannot be decoded and skip_broken is off.
        ValueError: the folder holds something else.
    """
    layout = Layout(
        kind="images",
        dtype="uint8",
        shape=(3, *height_width(size)),
        sources=len(source),
        per_shard=per_shard,
        attributes={"classes": source.classes, "source": source.fingerprint()},
    )

    def read(index: int) -> NDArray[np.uint8] | str:
        try:
            return center_crop(source.read(index), size)
        except BrokenImage as error:
            if not skip_broken:
                raise BrokenImage(f"{error}; remove the file, or pass --skip-broken") from None
            return str(error)

    def parts(span: range, pool: ThreadPoolExecutor) -> Iterator[Part]:
        for index, result in zip(span, in_order(pool, read, span), strict=True):
            if isinstance(result, str):
                yield Part(rows=torch.empty(0, *layout.shape), labels=[], skipped=[result])
            else:
                yield Part(rows=torch.from_numpy(result)[None], labels=[int(source.labels[index])])
            if progress:
                progress(index + 1, len(source))

    with shard_folder(folder, layout) as writer, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for shard in writer.missing():
            writer.write_parts(shard, parts(layout.span(shard), pool))
        writer.finish()
    return PackedImages(folder)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int = 64
) -> Iterator[R]:
    """As pool.map, but never more than `ahead` results wait: a shard of decoded images may not fit memory."""
    todo = iter(items)
    pending: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(todo, ahead))
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(function, item) for item in islice(todo, 1))


def decode_batch(
    source: ImageSource, indices: Sequence[int], size: Size, skip_broken: bool = False
) -> tuple[Tensor, list[int], list[str]]:
    """Centre-cropped images by number.

    Args:
        source: where they come from; packed images of this size are copied as they are.
        indices: which.
        size: (H, W), or the side of a square.
        skip_broken: leave out files that cannot be decoded.

    Returns:
        uint8 images (B, 3, H, W), the indices that they are of, and what was wrong with the others.

    Raises:
        BrokenImage: a file cannot be decoded and skip_broken is off.
    """
    if isinstance(source, PackedImages) and source.image_shape == height_width(size):
        return source.shards.gather(np.asarray(indices, dtype=np.int64)), list(indices), []
    images = torch.empty(len(indices), 3, *height_width(size), dtype=torch.uint8)
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


def chosen_rows(source: ImageSource, count: int) -> NDArray[np.int64]:
    """Which images are measured: `count` of the source, evenly spread, or all of them; in order."""
    return spread(len(source), count)


def spread(total: int, count: int) -> NDArray[np.int64]:
    """`count` of the numbers below `total`, evenly spread, so that every class has its share; or all."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
