"""Files and folders that appear whole or not at all, whatever kills the process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; when the block ends well it becomes `path`, otherwise `path` stays as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill; when the block ends well it becomes `path` and replaces what stood there.

    Between the removal of an old folder and the renaming of the new one lies an instant in which `path` is
    absent; nothing half-written is ever seen there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    if old.exists() and not path.exists():  # killed in that instant: until the block ends, the old one counts
        os.rename(old, path)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping.

    Raises:
        ValueError: not JSON, or not a mapping.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: it must hold a mapping, got {type(data).__name__}")
    return data


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(state: Mapping[str, Tensor], *facts: str) -> str:
    """16 hexadecimal digits that name exactly these weights (and facts): SHA-256 over names, types and bytes.

    The order of the entries, the device and the file format do not matter; one changed bit does.
    """
    digest = hashlib.sha256(repr(facts).encode())  # quoted, so that no fact can pass for two, or for a tensor
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _sync(path: Path) -> None:
    """Have the operating system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
