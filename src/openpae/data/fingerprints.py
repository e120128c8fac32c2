"""The fingerprint of a folder of files: what it sees of them, from coarse to fine."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

SEEN = 2048
"""Bytes at the beginning, in the middle and at the end of each file that the second part covers."""
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors that are the machine's fault, and not the file's."""
_AT_ONCE = 4096


def folder_fingerprint(root: Path, names: Sequence[str], *, whole: bool = False) -> str:
    """Parts of 16 hexadecimal digits, joined by dots; compare them with `fingerprints_agree`.

    The first part covers names and sizes, the second `SEEN` bytes at three places of each file. The times of
    the files do not count: a copy has the same fingerprint.

    Args:
        root: the folder.
        names: of the files, below it, in order.
        whole: add a third part over all of every file.

    Raises:
        OSError: a file is gone, or the machine has no memory or file handle left.
    """
    digests = [hashlib.sha256() for _ in range(3 if whole else 2)]

    def read(name: str) -> list[bytes]:
        return _parts(os.path.join(root, name), name, whole)

    with ThreadPoolExecutor(max_workers=16) as pool:  # a network disk answers many at once
        for start in range(0, len(names), _AT_ONCE):
            for parts in pool.map(read, names[start : start + _AT_ONCE]):
                for digest, part in zip(digests, parts, strict=True):
                    digest.update(part)
    return ".".join(digest.hexdigest()[:16] for digest in digests)


def _parts(path: str, name: str, whole: bool) -> list[bytes]:
    """What each part of the fingerprint takes of a file; one that cannot be read is named when decoded."""
    size = os.stat(path).st_size
    coarse = os.fsencode(f"{name} {size}\n")
    try:
        with open(path, "rb") as file:
            return [coarse, _three_places(file, size), *([_content(file)] if whole else [])]
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
    return [coarse] * (3 if whole else 2)


def _three_places(file: BufferedReader, size: int) -> bytes:
    parts = hashlib.sha256()
    for start in sorted({0, max(0, (size - SEEN) // 2), max(0, size - SEEN)}):
        file.seek(start)
        parts.update(file.read(SEEN))
    return parts.digest()


def _content(file: BufferedReader) -> bytes:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").digest()
