"""Images in tar and zip archives: class folders, the tar of tars of ImageNet, WebDataset, EDM2's zip."""

from __future__ import annotations

import json
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openpae.data.decode import BrokenImage
from openpae.data.listing import EXTENSIONS, archive_names, is_image_name, no_images
from openpae.data.records import (
    CLASS_FILES,
    ByteRanges,
    StoredImages,
    check_distinct,
    check_size,
    checked_name,
    class_names,
    class_names_beside,
    class_numbers,
    damaged_if_unreadable,
    read_span,
)

_LABEL_ENDINGS = ("cls", "json")
_JSON_LABELS = ("label", "cls", "class")
_LARGEST_LABEL = 2**20
_MOST_UNPACKED = 2**24
"""Bytes of a zip's member above which it must not be much smaller when compressed."""


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    """Its path; of a tar inside of the tar, below a folder of the inner tar's name."""
    number: int
    """Index of the tar."""
    start: int
    """First byte in the tar."""
    size: int
    """Bytes."""


def open_tars(path: Path, tars: Sequence[Path], *, full_hash: bool = False) -> StoredImages:
    """Images of tars: WebDataset shards if there are label files, otherwise class folders.

    A tar in the tar is a class, as in ImageNet's. Of several tars without folders each is a class, too.

    Args:
        path: what the user gave.
        tars: the archives in order.
        full_hash: see `StoredImages`.

    Raises:
        FileNotFoundError: no images.
        ValueError: a tar is damaged, or holds links, names that lead out of it or the same name twice; or
            labels are missing or of several kinds.
    """
    members: list[Member] = []
    for number, tar in enumerate(tars):
        with damaged_if_unreadable(tar), tarfile.open(tar, "r:") as archive:
            members += _walk(archive, tar, number)
    samples = _samples(path, tars, members)
    if samples is not None:
        return _web_dataset(path, tars, samples, full_hash)
    images = [member for member in members if is_image_name(member.name)]
    if len(tars) > 1 and all("/" not in member.name for member in images):
        images = [image._replace(name=f"{tars[image.number].stem}/{image.name}") for image in images]
    check_distinct(path, (image.name for image in images))
    by_name = {image.name: image for image in images}
    groups = archive_names(path, by_name)
    names, labels = _flattened(groups)
    reader = _ranges(tars, [by_name[name] for name in names])
    return StoredImages(path, reader, names, labels, list(groups), full_hash=full_hash)


def _flattened(groups: Mapping[str, list[str]]) -> tuple[list[str], NDArray[np.int64]]:
    """Names and labels of grouped images."""
    labels = np.repeat(np.arange(len(groups)), [len(names) for names in groups.values()])
    return [name for names in groups.values() for name in names], labels.astype(np.int64)


def _ranges(tars: Sequence[Path], members: Sequence[Member]) -> ByteRanges:
    numbers, starts, sizes = np.array([member[1:] for member in members], dtype=np.int64).T
    return ByteRanges(tars, numbers, starts, sizes)


def _walk(
    archive: tarfile.TarFile, path: Path, number: int, below: str = "", start: int = 0
) -> Iterator[Member]:
    """The files of a tar, and of the tars in it, whose names get the prefix `below`."""
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # a million of them take gigabytes
        name = below + checked_name(path, info.name)
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise ValueError(
                f"{path} holds {name}, a link, device or sparse file; make it again with the files themselves"
            )
        if not name.endswith(".tar"):
            check_size(path, name, info.size)
            yield Member(name, number, start + info.offset_data, info.size)
        elif below:
            raise ValueError(f"{path} holds tars of tars of tars; unpack {name} first")
        else:
            with tarfile.open(fileobj=archive.extractfile(info), mode="r:") as inner:
                yield from _walk(inner, path, number, f"{name[:-4]}/", start + info.offset_data)
    # tarfile takes a damaged header for the end, which is a block of zeros.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
        raise ValueError(f"{path} is damaged: byte {start + archive.offset:,} begins no file")


def _samples(
    path: Path, tars: Sequence[Path], members: Sequence[Member]
) -> list[tuple[Member, Member]] | None:
    """Image and label file of each WebDataset sample; None if the tars hold no label files."""
    images: dict[tuple[int, str], Member] = {}
    labels: dict[str, dict[tuple[int, str], Member]] = {ending: {} for ending in _LABEL_ENDINGS}
    twice = ""
    for member in members:
        folder, _, file = member.name.rpartition("/")
        stem, _, ending = file.partition(".")
        key, ending = (member.number, f"{folder}/{stem}"), ending.lower()
        if ending in labels:
            labels[ending][key] = member
        elif f".{ending}" in EXTENSIONS and is_image_name(member.name):
            twice = twice or (f"{images[key].name} and {member.name}" if key in images else "")
            images[key] = member
    for known in labels.values():
        first = next((known[key] for key in images if key in known), None)
        if first is None or _label(tars, first) is None:
            continue
        if twice:
            raise ValueError(f"{path} holds two images of one sample: {twice}; keep one of them")
        if lacking := [image.name for key, image in images.items() if key not in known]:
            raise ValueError(f"{path} has no label for {len(lacking)} images, such as {lacking[0]}")
        return [(image, known[key]) for key, image in images.items()]
    return None


def _label(tars: Sequence[Path], member: Member) -> int | str | None:
    """The label in a .cls or .json file of a sample; None if the JSON has none."""
    tar = tars[member.number]
    if member.size > _LARGEST_LABEL:
        raise ValueError(f"{tar} holds the label file {member.name} of {member.size:,} bytes")
    text = read_span(tar, member.start, member.size).decode(errors="replace").strip()
    if member.name.endswith(".cls"):
        return text
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{tar}/{member.name} is no JSON") from None
    values = [data[name] for name in _JSON_LABELS if name in data] if isinstance(data, dict) else []
    return next((value for value in values if isinstance(value, int | str)), None)


def _web_dataset(
    path: Path, tars: Sequence[Path], samples: Sequence[tuple[Member, Member]], full_hash: bool
) -> StoredImages:
    values = []
    for image, file in samples:
        if (value := _label(tars, file)) is None:
            raise ValueError(
                f"{path} has no label for {image.name}; its JSON needs {', '.join(_JSON_LABELS)}"
            )
        values.append(value)
    images = [image for image, _ in samples]
    labels, classes = class_numbers(path, values, class_names_beside(tars[0].parent))
    folders = [f"{tar.name}/" for tar in tars] if len(tars) > 1 else [""]
    names = [f"{folders[image.number]}{image.name}" for image in images]
    return StoredImages(path, _ranges(tars, images), names, labels, classes, full_hash=full_hash)


def open_zip(path: Path, *, full_hash: bool = False) -> StoredImages:
    """Images of a zip: as its dataset.json lists them (EDM2), otherwise class folders.

    Args:
        path: the archive.
        full_hash: see `StoredImages`.

    Raises:
        FileNotFoundError: no images.
        ValueError: the zip is damaged or encrypted, holds links, a bomb, names that lead out of it or the
            same name twice, or dataset.json does not fit.
    """
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        names = [_checked_entry(path, info) for info in infos]
        check_distinct(path, names)
        _check_overlap(path, infos)
        by_name = dict(zip(names, infos, strict=True))
        texts = {name: archive.read(by_name[name]).decode("utf-8") for name in _TEXTS if name in by_name}
    images = {name for name in names if is_image_name(name)}
    if "dataset.json" in texts:
        listed, values = _dataset_json(path, texts.pop("dataset.json"), images)
        known = next((class_names(path / name, text) for name, text in texts.items()), None)
        known = known or class_names_beside(path.parent)
        labels, classes = class_numbers(path, values, known) if values else _unlabelled(len(listed))
    else:
        groups = archive_names(path, images)
        listed, labels = _flattened(groups)
        classes = list(groups)
    reader = ZipMembers(path, [by_name[name] for name in listed])
    return StoredImages(path, reader, listed, labels, classes, full_hash=full_hash)


_TEXTS = ("dataset.json", *CLASS_FILES)


def _unlabelled(count: int) -> tuple[NDArray[np.int64], list[str]]:
    return np.zeros(count, dtype=np.int64), ["all"]


def _checked_entry(path: Path, info: zipfile.ZipInfo) -> str:
    name = checked_name(path, info.filename)
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{path} holds {name} encrypted or in a rare compression; zip it again without")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ValueError(f"{path} holds {name}, a link; make it again with the files themselves")
    check_size(path, name, info.file_size)
    if info.file_size > max(_MOST_UNPACKED, 100 * info.compress_size):
        raise ValueError(
            f"{path} holds {name}, {info.compress_size:,} bytes that would become {info.file_size:,}; "
            "zip it again without compression"
        )
    return name


def _check_overlap(path: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
    ordered = sorted(infos, key=lambda info: info.header_offset)
    for info, after in pairwise(ordered):
        if info.header_offset + 30 + info.compress_size > after.header_offset:
            raise ValueError(
                f"{path} holds {info.filename} and {after.filename} in the same bytes; zip it again"
            )


def _dataset_json(path: Path, text: str, images: Set[str]) -> tuple[list[str], list[int | str]]:
    """Names and labels of dataset.json, in its order; without labels the sorted names."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}/dataset.json is no JSON") from None
    rows = data.get("labels") if isinstance(data, dict) else ()
    if rows is None:
        if not images:
            raise no_images(path)
        return sorted(images), []
    fits = isinstance(rows, list) and all(
        isinstance(row, list) and list(map(type, row)) == [str, int] for row in rows
    )
    if not rows or not fits:
        raise ValueError(f'{path}/dataset.json must hold {{"labels": [["FILE", NUMBER], ...]}} or null')
    names = [row[0] for row in rows]
    if different := sorted(set(names) ^ images):
        where = "the zip" if different[0] in names else "dataset.json"
        raise ValueError(f"{path}: {different[0]} is missing in {where}, as are {len(different) - 1} others")
    return names, [row[1] for row in rows]


class ZipMembers:
    """A `Reader` of the members of a zip.

    Args:
        path: the zip.
        infos: its members, in order.
    """

    at_random = True

    def __init__(self, path: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
        self.files = [path]
        # Arrays, as a million ZipInfo take a gigabyte in every process.
        rows = [(i.header_offset, i.compress_size, i.file_size, i.compress_type, i.CRC) for i in infos]
        self.entries = np.array(rows, dtype=np.int64)

    def load(self, index: int) -> bytes:
        """See `Reader`."""
        start, packed, size, method, checksum = self.entries[index].tolist()
        head = read_span(self.files[0], start, 30)
        lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        data = read_span(self.files[0], start + 30 + lengths, packed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise BrokenImage(str(error)) from None
        if head[:4] != b"PK\3\4" or len(data) != size or zlib.crc32(data) != checksum:
            raise BrokenImage("its checksum in the zip is another")
        return data

    def samples(self) -> Iterator[bytes]:
        """See `Reader`. The zip keeps a checksum of every member."""
        yield self.entries[:, 2:].tobytes()
