"""Images on disk: a folder of files, or packed; read in an order that is a pure function of (seed, images seen)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

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
                f"{self.root} holds images both directly and in subfolders ({next(k for k in found if found[k])}); "
                "keep one subfolder per class, or all images in one folder"
            )
        if not flat and not any(found.values()):
            raise FileNotFoundError(f"no images in {self.root}; known endings: {' '.join(sorted(EXTENSIONS))}")
        if not flat and (empty := [name for name, files in found.items() if not files]):
            raise ValueError(f"{self.root} has {len(empty)} class folders without images: {', '.join(empty[:5])}")
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
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


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
    """Scale so that the shorter side is `size`: halved by boxes while twice too large, then bicubic (as ADM)."""
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


class ImageBatch(NamedTuple):
    """Images of one device batch."""

    images: Tensor
    """uint8, (B, 3, S, S)."""
    labels: Tensor
    """int64, (B,)."""
    features: Tensor | None = None
    """Cached VFM features, float16, (B, N, D)."""
    skipped: tuple[str, ...] = ()
    """Broken files whose places others took."""


class TrainingImages(Dataset[ImageBatch]):
    """Augmented images by position in training: a pure function of (seed, images seen).

    Args:
        source: where they come from.
        size: side S of what comes out.
        seed: of order and augmentation.
        augment: "none" centre-crops; "flip" also mirrors half of them; "crop" scales the shorter side
            to `resize`, cuts a random square and mirrors half of them.
        resize: see "crop".
        skip_broken: put the next readable image in the place of a broken one, and say so.
        features: cached VFM features of a packed source, one row an image.

    Raises:
        ValueError: resize is smaller than size, or features are asked for that do not fit source and augmentation.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size: int,
        seed: int,
        augment: Literal["none", "flip", "crop"] = "none",
        resize: int | None = None,
        skip_broken: bool = False,
        features: Shards | None = None,
    ) -> None:
        if augment == "crop" and (resize is None or resize < size):
            raise ValueError(f"augment 'crop' needs resize >= {size}, got {resize}")
        if features is not None:
            check_features(features, source, augment)
        self.source, self.size, self.seed = source, size, seed
        self.augment, self.resize = augment, resize
        self.skip_broken, self.features = skip_broken, features

    def __getitems__(self, positions: list[int]) -> ImageBatch:
        """The batch of these positions (images seen before each)."""
        where = np.asarray(positions, dtype=np.int64)
        rows = shuffled(where, len(self.source), self.seed)
        bits = random_bits(where, self.seed)
        flips = (bits & 1).astype(bool) if self.augment != "none" else np.zeros(len(where), dtype=bool)
        packed = isinstance(self.source, PackedImages) and self.source.image_size == self.size
        skipped: list[str] = []
        if packed and self.augment != "crop":
            assert isinstance(self.source, PackedImages)  # for the type checker: `packed` says so
            images = self.source.shards.gather(rows)
        else:
            taken = [self._read(int(row), int(bit), skipped) for row, bit in zip(rows, bits, strict=True)]
            rows = np.array([row for row, _ in taken])
            images = torch.from_numpy(np.stack([pixels for _, pixels in taken]))
        turn = torch.from_numpy(flips)
        images = torch.where(turn.view(-1, 1, 1, 1), images.flip(-1), images) if flips.any() else images
        features = None if self.features is None else self.features.gather(rows, flips.astype(np.int64))
        return ImageBatch(images, torch.from_numpy(self.source.labels[rows]), features, tuple(skipped))

    def _read(self, row: int, bits: int, skipped: list[str]) -> tuple[int, NDArray[np.uint8]]:
        for offset in range(len(self.source)):
            index = (row + offset) % len(self.source)
            try:
                return index, self._cut(self.source.read(index), bits)
            except BrokenImage as error:
                if not self.skip_broken:
                    raise BrokenImage(f"{error}; remove the file, or pass --data.skip-broken") from None
                skipped.append(str(error))
        raise BrokenImage(f"not one of the {len(self.source)} images can be decoded; the last: {skipped[-1]}")

    def _cut(self, image: Image.Image, bits: int) -> NDArray[np.uint8]:
        if self.augment != "crop":
            return center_crop(image, self.size)
        image = resize_shorter(image, self.resize or self.size)
        # Two numbers in [0, 1) from bits that the flip does not use.
        across, down = ((bits >> shift) % 2**20 / 2**20 for shift in (8, 32))
        left, top = int(across * (image.width - self.size + 1)), int(down * (image.height - self.size + 1))
        return crop(image, self.size, left, top)


class StepBatches(Sampler[list[int]]):
    """Positions of the device batches of steps first, first + 1, ..., last - 1, in order.

    Step s sees positions s G, ..., (s + 1) G - 1 (G the global batch), cut into device batches.
    """

    def __init__(self, steps: range, global_batch_size: int, device_batch_size: int) -> None:
        self.steps, self.whole, self.part = steps, global_batch_size, device_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for start in range(0, self.whole, self.part):
                yield list(range(step * self.whole + start, step * self.whole + min(start + self.part, self.whole)))

    def __len__(self) -> int:
        return len(self.steps) * -(-self.whole // self.part)


def loader(dataset: Dataset[ImageBatch], sampler: StepBatches, num_workers: int, pin: bool) -> DataLoader[ImageBatch]:
    """A DataLoader whose dataset makes whole batches (`__getitems__`), in the sampler's order."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin,
        persistent_workers=num_workers > 0,
        multiprocessing_context="spawn" if num_workers else None,
    )


def shuffled(positions: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Rows at these positions of an endless series of epochs, each a fresh permutation of `count` rows."""
    epochs, offsets = np.divmod(positions, count)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _permutation(seed, int(epoch), count)[offsets[chosen]]
    return rows


def random_bits(positions: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """64 random bits per position, a pure function of (seed, position): two rounds of splitmix64."""
    x = positions.astype(np.uint64) + np.uint64(seed % 2**32) * np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


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


def check_features(features: Shards, source: ImageSource, augment: str) -> None:
    """Raise ValueError unless cached features belong to this source and augmentation."""
    if not isinstance(source, PackedImages):
        raise ValueError("cached features need packed images (pae pack), so that row and image stay together")
    if augment == "crop":
        raise ValueError("cached features know no random crops; use augment 'none' or 'flip'")
    if features.attributes["images"] != source.fingerprint() or len(features) != len(source):
        raise ValueError(f"the features in {features.folder} are not those of the images in {source.shards.folder}")
    if augment == "flip" and features.shape[0] < 2:
        raise ValueError(f"the features in {features.folder} lack the mirrored images; cache them with flips")


def _as_is(batch: ImageBatch) -> ImageBatch:
    return batch


_LAST_PERMUTATIONS: dict[tuple[int, int, int], NDArray[np.int64]] = {}


def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    key = (seed, epoch, count)
    if key not in _LAST_PERMUTATIONS:
        while len(_LAST_PERMUTATIONS) > 3:  # a batch may span two epochs, and training and evaluation alternate
            del _LAST_PERMUTATIONS[next(iter(_LAST_PERMUTATIONS))]
        _LAST_PERMUTATIONS[key] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    return _LAST_PERMUTATIONS[key]


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


def class_names(labels: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Names of class indices."""
    return [classes[label] for label in labels]
