"""Arrays of npz files, read with limits: no pickle, and no more data than the file claims."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_LARGEST_COMPRESSED = 2**30
"""Most bytes of one array of statistics or features, if the file itself is smaller."""


def npz_keys(path: Path) -> set[str]:
    """Names of the arrays of an npz file.

    Raises:
        ValueError: no npz file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    except Exception:  # a damaged directory can raise any of them
        raise ValueError(f"{path} is no npz file") from None


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


@contextmanager
def npz_entry(path: Path, name: str) -> Iterator[tuple[IO[bytes], _Header]]:
    """Open one array of an npz file at the start of its data, with its shape and type. No pickle is read.

    Raises:
        ValueError: no such array, or it is damaged, encrypted or compressed in an unknown way. That includes
            errors of reads inside the block.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
            shape, fortran, dtype = (read or np.lib.format.read_array_header_2_0)(file)
            size = archive.getinfo(f"{name}.npy").file_size
            if dtype.hasobject or math.prod(shape) * dtype.itemsize > size:
                raise ValueError(f"{name} claims {shape} of {dtype}, which its {size:,} bytes do not hold")
            yield file, _Header(shape, fortran, dtype)
    except KeyError:
        known = ", ".join(sorted(npz_keys(path))) or "nothing"
        raise ValueError(f"{path} holds no {name}; it holds: {known}") from None
    except Exception as error:  # a damaged file can raise any of them
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def npz_array(path: Path, name: str, kinds: str = "fiu") -> NDArray[Any]:
    """Read one array of an npz file.

    Args:
        path: the file.
        name: name of the array.
        kinds: NumPy's letters of the allowed types; f, i and u are real numbers, U is text.

    Raises:
        ValueError: see `npz_entry`; or the array has another type, or is compressed and above 1 GiB.
    """
    with npz_entry(path, name) as (file, (shape, fortran, dtype)):
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in kinds:
            raise ValueError(f"{name} must hold {'text' if kinds == 'U' else 'real numbers'}, got {dtype}")
        if size > max(_LARGEST_COMPRESSED, path.stat().st_size):
            raise ValueError(f"{name} would take {size:,} bytes")
        data = file.read(size)
        if len(data) < size or file.read(1):
            raise ValueError(f"{name} does not hold exactly {size:,} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()
