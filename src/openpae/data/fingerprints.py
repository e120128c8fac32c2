"""Fingerprints of folders of files, in parts from coarse to fine."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from itertools import islice
from pathlib import Path

SAMPLED_BYTES = 2048
"""Bytes at the start, middle and end of each file that the second part covers."""
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors that are not caused by the file: no file handle or memory is left."""
_BLOCK = 4096


def folder_fingerprint(root: Path, names: Sequence[str], *, full_hash: bool = False) -> str:
    """Parts of 16 hexadecimal digits, joined by dots; compare them with `fingerprints_agree`.

    The first part covers names and sizes, the second `SAMPLED_BYTES` bytes at three places of each file.
    File times do not count, so a copy has the same fingerprint.

    Args:
        root: the folder.
        names: names of the files relative to the root, in order.
        full_hash: add a third part over all bytes of every file.

    Raises:
        OSError: a file is absent, or no memory or file handle is left.
    """
    digests = [hashlib.sha256() for _ in range(3 if full_hash else 2)]

    def read(name: str) -> list[bytes]:
        return _parts(os.path.join(root, name), name, full_hash)

    with ThreadPoolExecutor(max_workers=16) as pool:  # hides the latency of network disks
        for start in range(0, len(names), _BLOCK):
            for parts in pool.map(read, names[start : start + _BLOCK]):
                for digest, part in zip(digests, parts, strict=True):
                    digest.update(part)
    return ".".join(digest.hexdigest()[:16] for digest in digests)


def _parts(path: str, name: str, full_hash: bool) -> list[bytes]:
    """The bytes of a file for each part. An unreadable file is reported when it is decoded."""
    size = os.stat(path).st_size
    coarse = os.fsencode(f"{name} {size}\n")
    try:
        with open(path, "rb") as file:
            return [coarse, _three_places(file, 0, size), *([_content(file)] if full_hash else [])]
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
    return [coarse] * (3 if full_hash else 2)


def joined(*parts: Iterable[bytes]) -> str:
    """A fingerprint of several parts: 16 hexadecimal digits for the bytes of each, joined by dots."""
    digests = [hashlib.sha256() for _ in parts]
    for digest, content in zip(digests, parts, strict=True):
        for piece in content:
            digest.update(piece)
    return ".".join(digest.hexdigest()[:16] for digest in digests)


def span_samples(spans: Iterable[tuple[Path, int, int]]) -> Iterator[bytes]:
    """Hash of `SAMPLED_BYTES` bytes at three places of each span (file, first byte, bytes) of a file."""

    def read(span: tuple[Path, int, int]) -> bytes:
        with span[0].open("rb") as file:
            return _three_places(file, *span[1:])

    remaining = iter(spans)
    with ThreadPoolExecutor(max_workers=16) as pool:
        while block := list(islice(remaining, _BLOCK)):
            yield from pool.map(read, block)


def contents(files: Iterable[Path]) -> Iterator[bytes]:
    """Hash of all bytes of each file."""
    for path in files:
        with path.open("rb") as file:
            yield _content(file)


def _three_places(file: BufferedReader, first: int, size: int) -> bytes:
    parts = hashlib.sha256()
    for start in sorted({0, max(0, (size - SAMPLED_BYTES) // 2), max(0, size - SAMPLED_BYTES)}):
        file.seek(first + start)
        parts.update(file.read(min(size, SAMPLED_BYTES)))
    return parts.digest()


def _content(file: BufferedReader) -> bytes:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").digest()
