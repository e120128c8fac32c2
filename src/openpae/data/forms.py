"""The forms in which labelled images are read, apart from folders of files and packed images."""

from __future__ import annotations

import os
import re
from pathlib import Path

from openpae.data.archives import open_tars, open_zip
from openpae.data.arrays import open_npz
from openpae.data.hub_images import download_parquet, split_files
from openpae.data.label_files import LABEL_ENDINGS, open_labelled_folder
from openpae.data.listing import is_image_name
from openpae.data.parquet import open_parquet
from openpae.data.records import StoredImages

KNOWN_FORMS = (
    "class folders, FOLDER#LABELFILE, a tar or zip of class folders, a tar of tars, WebDataset shards "
    "({000..009}.tar or their folder), parquet files, hf:OWNER/NAME#SPLIT, a zip with dataset.json, an npz"
)
"""The forms, for messages."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
_HUB = "hf:"
_MOST_SHARDS = 100_000


def open_form(path: Path, *, full_hash: bool = False) -> StoredImages | None:
    """Open images in one of the forms; None for a folder of image files, and for a path that is absent.

    Args:
        path: a file, a folder of shards, a brace pattern of shards, or hf:OWNER/NAME. `#SPLIT` or
            `#LABELFILE` may follow, and for parquet `#SPLIT#COLUMN` with the column of the labels.
        full_hash: hash all bytes for the fingerprint, not samples.

    Raises:
        FileNotFoundError: a part of it is absent, or there are no images.
        ValueError: no known form, or damaged.
        ModuleNotFoundError: a package that reads the form is not installed.
    """
    if path.exists():
        base, parts = path, []
    else:
        first, *parts = str(path).split("#")
        base = Path(first)
    part, label = [*(part or None for part in parts), None, None][:2]
    if is_remote(path):
        files = download_parquet(str(base).removeprefix(_HUB), part)
        return open_parquet(path, files, label, full_hash=full_hash)
    if not base.exists() and (shards := _expanded(str(base))):
        return open_tars(path, shards, full_hash=full_hash)
    if base.is_dir():
        return _open_folder(path, base, part, label, full_hash)
    return _open_file(path, base, part, label, full_hash) if base.is_file() else None


def is_remote(path: Path) -> bool:
    """Whether a path names a data set of the hub."""
    return str(path).startswith(_HUB) and not path.exists()


def _open_folder(
    path: Path, base: Path, part: str | None, label: str | None, full_hash: bool
) -> StoredImages | None:
    if part and part.lower().endswith(LABEL_ENDINGS):
        return open_labelled_folder(base, Path(part), full_hash=full_hash)
    files = _stored_in(base)
    if tars := [base / name for name in files if name.endswith(".tar")]:
        return open_tars(path, tars, full_hash=full_hash)
    if tables := [name for name in files if name.endswith(".parquet")]:
        chosen = [base / name for name in split_files(str(base), tables, part)]
        return open_parquet(path, chosen, label, full_hash=full_hash)
    if part is not None:
        raise ValueError(
            f"{base} holds no parquet files with a split {part}; a label file ends with "
            f"{' '.join(LABEL_ENDINGS)}"
        )
    return None


def _stored_in(folder: Path) -> list[str]:
    """Sorted tars directly in a folder and parquet files below it; none if it also holds image files."""
    stored: list[str] = []
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(map(is_image_name, names)):
            return []
        ending = (".tar", ".parquet") if Path(at) == folder else (".parquet",)
        known = (name for name in names if name.endswith(ending) and not name.startswith("."))
        stored += [os.path.relpath(os.path.join(at, name), folder) for name in known]
    return sorted(stored)


def _open_file(
    path: Path, base: Path, part: str | None, label: str | None, full_hash: bool
) -> StoredImages | None:
    with base.open("rb") as file:
        head = file.read(512)
    if head[:2] in _COMPRESSED:
        raise ValueError(
            f"{base} is compressed with {_COMPRESSED[head[:2]]}, which cannot be read at random; "
            "unpack it to a tar or a folder"
        )
    if head[:4] == b"PAR1":
        return open_parquet(path, [base], label, full_hash=full_hash)
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        if base.suffix.lower() == ".npz":
            return open_npz(base, part, full_hash=full_hash)
        return open_zip(base, full_hash=full_hash)
    if head[257:262] == b"ustar" or base.suffix.lower() == ".tar":
        return open_tars(path, [base], full_hash=full_hash)
    raise ValueError(f"{base} is in no form that is read; known: {KNOWN_FORMS}")


def _expanded(pattern: str) -> list[Path]:
    """The shards of a pattern such as data-{000..009}.tar; empty without braces."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return []
    first, last = (int(number) for number in match.groups())
    if not first <= last < first + _MOST_SHARDS:
        raise ValueError(f"{pattern} must count up, to at most {_MOST_SHARDS:,} shards")
    numbers = [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    shards = [Path(f"{pattern[: match.start()]}{number}{pattern[match.end() :]}") for number in numbers]
    if absent := [shard for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{len(absent)} shards of {pattern} are absent, such as {absent[0]}")
    return shards
