"""Images inside of archives, tables and arrays: one interface, and the numbering of their classes.

A reader gives one stored image by index. `StoredImages` makes a labelled image source of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openpae.data.decode import BrokenImage, read_image
from openpae.data.fingerprints import MACHINE_ERRORS, contents, joined, span_samples

LARGEST_IMAGE = 2**30
"""Most bytes of a stored image. A larger one is a mistake, or an attack."""
MOST_CLASSES = 2**20
"""Most classes of a data set."""
CLASS_FILES = ("classes.txt", "classnames.txt")
"""Files with the names of numbered classes, one a line."""


class Reader(Protocol):
    """Stored images by index. Any thread may read, and a pickled copy reads in another process."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold everything."""
        ...

    @property
    def at_random(self) -> bool:
        """False if images can only be read in order."""
        ...

    def load(self, index: int) -> bytes | NDArray[np.uint8]:
        """Content of an image file, or pixels (H, W, 3). Raises BrokenImage if it cannot be read."""
        ...

    def samples(self) -> Iterator[bytes]:
        """Bytes that change with the content, of every image or of every file."""
        ...


class StoredImages:
    """Labelled images of a reader.

    Args:
        path: what the user gave; errors name it.
        reader: the images.
        names: name of each image.
        labels: class of each image: an index into `classes`.
        classes: names of the classes.
        full_hash: add a hash of all bytes to the fingerprint.

    Raises:
        ValueError: two images have one name.
    """

    def __init__(
        self,
        path: Path,
        reader: Reader,
        names: list[str],
        labels: NDArray[np.int64],
        classes: list[str],
        *,
        full_hash: bool = False,
    ) -> None:
        self.path, self.reader, self.names, self.full_hash = path, reader, names, full_hash
        self.labels, self.classes = labels, classes
        check_distinct(path, names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def at_random(self) -> bool:
        """Whether images can be read in any order."""
        return self.reader.at_random

    def name(self, index: int) -> str:
        """Name of this image inside of its file."""
        return self.names[index]

    def read(self, index: int) -> Image.Image:
        """The image, RGB. Raises BrokenImage if it cannot be decoded."""
        name = self.path / self.names[index]
        try:
            content = self.reader.load(index)
        except BrokenImage as error:
            raise BrokenImage(f"{name} cannot be decoded: {error}") from None
        return read_image(name, content) if isinstance(content, bytes) else Image.fromarray(content)

    def fingerprint(self) -> str:
        """One part over names, labels and sizes of files, one over samples of the content; see
        `fingerprints`."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        named = (
            f"{name} {label}\n".encode(errors="surrogateescape")
            for name, label in zip(self.names, self.labels.tolist(), strict=True)
        )
        sizes = f"{[file.stat().st_size for file in self.reader.files]}".encode()
        parts = [contents(self.reader.files)] if self.full_hash else []
        return joined([*named, sizes], self.reader.samples(), *parts)


@dataclass(frozen=True)
class ByteRanges:
    """A `Reader` of image files that are ranges of bytes of other files: members of a tar, for one."""

    files: Sequence[Path]
    """The files."""
    numbers: NDArray[np.int64]
    """(n,) index of the file of each image."""
    starts: NDArray[np.int64]
    """(n,) first byte of each image."""
    sizes: NDArray[np.int64]
    """(n,) bytes of each image."""
    shape: tuple[int, ...] = ()
    """(H, W) or (H, W, channels) of images that are pixels, uint8; empty for image files."""
    at_random: bool = True
    """See `Reader`."""

    def load(self, index: int) -> bytes | NDArray[np.uint8]:
        """See `Reader`."""
        data = read_span(*self._span(index))
        return as_rgb(np.frombuffer(data, np.uint8).reshape(self.shape)) if self.shape else data

    def samples(self) -> Iterator[bytes]:
        """See `Reader`."""
        return span_samples(map(self._span, range(len(self.starts))))

    def _span(self, index: int) -> tuple[Path, int, int]:
        return self.files[self.numbers[index]], int(self.starts[index]), int(self.sizes[index])


def read_span(path: Path, start: int, size: int) -> bytes:
    """A range of bytes of a file. Raises BrokenImage if the file ends before it, or cannot be read."""
    try:
        # A file of its own for each read: threads and processes share no position.
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            data = b""
            while len(data) < size and (piece := file.read(size - len(data))):
                data += piece
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        raise BrokenImage(error.strerror or str(error)) from None
    if len(data) < size:
        raise BrokenImage(f"{path} ends before it")
    return data


def as_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels (H, W), (H, W, 1) or (H, W, 3) as (H, W, 3)."""
    grey = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(np.broadcast_to(grey, (*grey.shape[:2], 3)))


def check_size(path: Path, name: str, size: int) -> None:
    """Raise ValueError for a stored image that is too large to be one."""
    if size > LARGEST_IMAGE:
        raise ValueError(f"{path} holds {name} of {size:,} bytes; at most {LARGEST_IMAGE:,} are taken")


def checked_name(path: Path, name: str) -> str:
    """A name in an archive, without a leading "./".

    Raises:
        ValueError: it leads out of the archive.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(
            f"{path} holds the name {name!r}; names must stay inside of the archive: make it again"
        )
    return "/".join(parts)


def check_distinct(path: Path, names: Iterable[str]) -> None:
    """Raise ValueError if a name comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{path} holds {name} twice; make it again with distinct names")
        seen.add(name)


@contextmanager
def damaged_if_unreadable(path: Path) -> Iterator[None]:
    """Turn what a library raises at a damaged file into a ValueError that names the file."""
    try:
        yield
    except (FileNotFoundError, PermissionError, ModuleNotFoundError, MemoryError, BrokenImage):
        raise
    except Exception as error:  # damaged bytes can raise any error
        if type(error) is ValueError or (isinstance(error, OSError) and error.errno):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is damaged: {reason}; copy or download it again") from None


def class_numbers(
    where: Path, values: Sequence[int | str], names: Sequence[str] | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Labels and class names of images from what a data set says of each.

    Args:
        where: the data, for messages.
        values: a number or a name for each image; text of digits, also with a sign, is a number if all values
            are numbers.
        names: names of the classes in order, if they are known.

    Returns:
        Labels (n,) and the names: `names`, or the distinct names sorted, or the numbers as text.

    Raises:
        ValueError: numbers and names are mixed, a number is out of range, a name is not in `names` or longer
            than a file name, or a value is neither.
    """
    for value in values:
        if type(value) is not int and not (isinstance(value, str) and len(value) <= 255):
            raise ValueError(
                f"{where} has the label {repr(value)[:40]}; labels must be integers, or names of at most 255 "
                "characters"
            )
    numbers = [value for value in values if isinstance(value, int) or re.fullmatch(r"[+-]?\d+", value)]
    if len(numbers) == len(values):
        integers = list(map(int, numbers))
        most = MOST_CLASSES if names is None else len(names)
        for bad in (number for number in integers if not 0 <= number < most):
            raise ValueError(f"{where} has the label {str(bad)[:40]}; labels must be 0 to {most - 1}")
        labels = np.array(integers, dtype=np.int64)
        known = [str(label) for label in range(int(labels.max(initial=-1)) + 1)]
        return labels, known if names is None else list(names)
    if any(isinstance(value, int) for value in values):
        raise ValueError(f"{where} has numbers and names as labels; they must be of one kind")
    texts = [str(value) for value in values]
    index = {name: label for label, name in enumerate(sorted(set(texts)) if names is None else names)}
    for text in texts:
        if text not in index:
            raise ValueError(f"{where} has the label {text!r}, which is not among its class names")
    return np.array([index[text] for text in texts], dtype=np.int64), list(index)


def class_names(where: Path, text: str) -> list[str]:
    """Class names of a text, one a line.

    Raises:
        ValueError: two lines are equal, or there is none.
    """
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{where} must hold one distinct class name a line")
    return names


def class_names_beside(folder: Path) -> list[str] | None:
    """`class_names` of classes.txt or classnames.txt in a folder; None without one."""
    for file in (folder / name for name in CLASS_FILES):
        if file.is_file():
            return class_names(file, file.read_text(encoding="utf-8"))
    return None
