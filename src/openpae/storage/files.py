"""Atomic writes of files and folders, JSON, hashes and fingerprints."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk, a used-up quota and a file size limit."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
"""Flags for a partial file: create it, and follow no link with its name."""
_LARGEST_JSON = 2**28
"""Largest size in bytes of a JSON file."""


class DiskFull(OSError):
    """No space is left for a file or folder; the message says how much was written and what to free."""


@contextlib.contextmanager
def atomic_file(path: Path, wanted: int | None = None) -> Iterator[Path]:
    """A path to write to. It replaces `path` if the block succeeds; otherwise `path` stays unchanged.

    Args:
        path: the file; the target of a link is replaced.
        wanted: expected size in bytes, for the message of `DiskFull`.

    Raises:
        DiskFull: no space is left.
        IsADirectoryError: a folder has this name.
    """
    given, path = path, resolved(path)
    if path.is_dir():
        raise IsADirectoryError(f"{given} is a folder, but a file is to be written; name another")
    partial = reserved(path, "partial")
    discard(partial)
    try:
        with explain_disk_full(given, partial, wanted):
            os.close(os.open(partial, _NEW, 0o666))
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, wanted: int | None = None) -> Iterator[Path]:
    """A new folder to write into. It replaces `path` if the block succeeds.

    `path` is absent for an instant between two renames, but never incomplete.

    Args:
        path: the folder; the target of a link is replaced.
        wanted: see `atomic_file`.

    Raises:
        DiskFull: no space is left.
        NotADirectoryError: a file has this name.
    """
    given, path = path, resolved(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{given} is a file, but a folder is to be written; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = reserved(path, "partial"), reserved(path, "old")
    if old.is_dir() and not old.is_symlink() and not path.exists():  # killed in that instant: restore
        os.rename(old, path)
    for leftover in (partial, old):
        discard(leftover)
    partial.mkdir()
    try:
        with explain_disk_full(given, partial, wanted):
            yield partial
            for file in partial.rglob("*"):
                _sync(file)
            _sync(partial)
            if path.exists():
                os.rename(path, old)
                os.rename(partial, path)
                shutil.rmtree(old)
            else:
                os.rename(partial, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def reserved(path: Path, state: str) -> Path:
    """The hidden name beside `path` for a partial, old or removed version of it.

    What lies there is removed without a question. So the name says whose it is: other programs write
    `.partial` files too. A long name is replaced by its hash, because file systems allow 255 bytes.
    """
    name = os.fsencode(path.name)
    short = path.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()[:32]
    return path.with_name(f".{short}.openpae-{state}")


def resolved(path: Path) -> Path:
    """The absolute path with all links resolved; it need not exist. Raises OSError for a circle of links."""
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise OSError(f"{path} is a link in a circle of links; remove it or name another")
    return place


def remove_folder(path: Path) -> None:
    """Remove a folder, if present, and what a killed removal left.

    The folder is renamed first, so that a kill leaves no partial folder under its name.
    """
    removed = reserved(path, "removed")
    discard(removed)
    if path.exists():
        path.rename(removed)
        shutil.rmtree(removed)


def discard(path: Path) -> None:
    """Remove a file or folder, if present; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_disk_full(path: Path, partial: Path | None = None, wanted: int | None = None) -> Iterator[None]:
    """Turn any error of a full disk into `DiskFull`; pass other errors on.

    The block writes `path`, or `partial` first if it is given. `wanted` is the expected size in bytes.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not _is_full(error, partial):
            raise
        written, free = _size(partial or path), shutil.disk_usage(path.parent).free
        of_all = "" if wanted is None else f" of {wanted:,}"
        raise DiskFull(
            f"no room for {path}: the disk, a quota or a limit took {written:,}{of_all} bytes and no more "
            f"({free:,} are free on that disk); free some, older checkpoints for one, and run the same "
            "command again: what was complete is as it was"
        ) from error


def _is_full(error: BaseException, partial: Path | None) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        # safetensors states the number only in its message.
        stated = re.search(r"\(os error (\d+)\)", str(cause))
        if getattr(cause, "errno", None) in _FULL or (stated and int(stated[1]) in _FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    # The writers of torch and NumPy hide the number.
    return partial is not None and isinstance(error, OSError | RuntimeError) and _takes_no_more(partial)


def _takes_no_more(partial: Path) -> bool:
    """Whether the file written last cannot grow."""
    files = _files(partial)
    if not files:
        return False
    try:
        with max(files, key=lambda file: file.stat().st_mtime_ns).open("ab") as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in _FULL
    return False


def _files(path: Path) -> list[Path]:
    return [file for file in (path, *path.rglob("*")) if file.is_file()]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping. Raises ValueError if the file holds none, or is larger than 256 MiB."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a file, got a folder, a pipe or a device")
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{path} is too large: it has {size:,} bytes, at most {_LARGEST_JSON:,} are read")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8 or a huge number
        raise ValueError(f"{path} is damaged: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: it must hold a mapping, got {type(data).__name__}")
    return data


def read_fields(path: Path, **kinds: type) -> dict[str, Any]:
    """`read_json` of a file that must have these fields, of these types. An int passes for a float.

    Raises:
        ValueError: see `read_json`; or a field is missing, of another type, or not finite.
    """
    data = read_json(path)
    wrong = [
        name
        for name, kind in kinds.items()
        if not (is_number(data.get(name)) if kind is float else type(data.get(name)) is kind)
    ]
    if wrong:
        raise ValueError(f"{path} is damaged: it has no fitting {', '.join(sorted(wrong))}")
    return data


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(state: Mapping[str, Tensor], *facts: str) -> str:
    """16 hexadecimal digits of a SHA-256 over names, types, shapes and bytes of weights, and over `facts`.

    The order of the entries, the device and the file format do not matter.
    """
    digest = hashlib.sha256(repr(facts).encode())  # quoted, so that facts stay apart
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprints_agree(first: str, second: str) -> bool:
    """Whether two fingerprints agree in all parts that both have.

    Those of image folders have parts from coarse to fine, joined by dots; older ones have only the first.
    """
    return all(a == b for a, b in zip(first.split("."), second.split("."), strict=False))


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
