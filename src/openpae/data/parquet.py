"""Images of parquet files as the hub has them: a column of encoded images, and a column of labels."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openpae.data.decode import BrokenImage
from openpae.data.fingerprints import span_samples
from openpae.data.records import StoredImages, class_names_beside, class_numbers, damaged_if_unreadable

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_LABELS = ("label", "labels", "class", "cls")
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
_CACHED = 2**28
"""Bytes of row groups that a process keeps. A single larger group cannot be read at random."""
_LARGEST_GROUP = 2**33


def open_parquet(
    path: Path, files: Sequence[Path], label: str | None = None, *, full_hash: bool = False
) -> StoredImages:
    """Images of parquet files, in the order of files and rows.

    The schema's `huggingface` metadata name the columns and the classes. Without them the columns are called
    image and label, or as `datasets` calls them; text labels are class names.

    Args:
        path: what the user gave.
        files: the parquet files, with equal columns.
        label: name of the label column; by default the only one, or the one called label.
        full_hash: see `StoredImages`.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: a file is damaged, has no column of images or several of labels, or differs from the
            first.
    """
    names: list[str] = []
    values: list[int | str] = []
    columns: tuple[str, str | None, list[str] | None] | None = None
    for file in files:
        with damaged_if_unreadable(file), _opened(file) as table:
            own = _columns(file, table, label)
            if columns is not None and own != columns:
                raise ValueError(f"{file} has other columns or classes than {files[0]}; give them one by one")
            columns = own
            rows = table.metadata.num_rows
            if columns[1] is not None:
                column = table.read(columns=[columns[1]], use_threads=False).column(0)
                if column.null_count:
                    raise ValueError(f"{file} has {column.null_count} rows without a label in {columns[1]}")
                values += column.to_pylist()
        names += [f"{file.name}[{row}]" for row in range(rows)]
    assert columns is not None
    if not names:
        raise FileNotFoundError(f"no rows in {path}")
    image, labelled, classes = columns
    known = classes or class_names_beside(files[0].parent)
    if labelled is None:
        values, known = [0] * len(names), ["all"]
    labels, classes = class_numbers(path, values, known)
    return StoredImages(path, ParquetRows(files, image), names, labels, classes, full_hash=full_hash)


def _opened(path: Path) -> ParquetFile:
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} needs pyarrow; install it with: pip install openpae[data]"
        ) from None
    return ParquetFile(path)


def _columns(path: Path, table: ParquetFile, wanted: str | None) -> tuple[str, str | None, list[str] | None]:
    """Name of the image column, of the label column if there is one, and class names if they are known."""
    import pyarrow as pa

    schema = table.schema_arrow
    features = _features(schema.metadata or {})
    images = [
        name
        for name in schema.names
        if features.get(name, {}).get("_type") == "Image" or (not features and name.lower() in _IMAGES)
    ]
    if len(images) != 1:
        raise ValueError(
            f"{path} must have one column of images, got {', '.join(images) or 'none'} of the columns "
            f"{', '.join(schema.names)}"
        )
    kind = schema.field(images[0]).type
    bytes_type = (
        kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    )
    if not (pa.types.is_binary(bytes_type) or pa.types.is_large_binary(bytes_type)):
        raise ValueError(f"the column {images[0]} of {path} must hold encoded images, got {kind}")
    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    labels = labels or [name for name in schema.names if name.lower() in _LABELS]
    chosen = [name for name in labels if name.lower() in _LABELS] if len(labels) > 1 else labels
    if wanted is not None and wanted not in schema.names:
        raise ValueError(f"{path} has no column {wanted}; it has {', '.join(schema.names)}")
    if wanted is None and len(labels) > 1 and len(chosen) != 1:
        raise ValueError(f"{path} has the label columns {', '.join(labels)}; name one: SOURCE#SPLIT#COLUMN")
    name = wanted or (chosen[0] if chosen else None)
    classes = features.get(name, {}).get("names") if name is not None else None
    return images[0], name, [str(c) for c in classes] if isinstance(classes, list) else None


def _features(metadata: Any) -> dict[str, Any]:
    """The features of the `huggingface` metadata of a schema, by column."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


class ParquetRows:
    """A `Reader` of the rows of parquet files. It reads a row group at a time and keeps the last ones.

    Args:
        files: the files.
        column: the column of encoded images.

    Raises:
        ValueError: a row group is too large to read.
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files, self.column = files, column
        rows: list[int] = []
        self._groups: list[tuple[int, int]] = []  # (file, row group in it)
        self._spans: list[tuple[Path, int, int]] = []
        largest = 0
        for number, file in enumerate(files):
            with damaged_if_unreadable(file), _opened(file) as table:
                for group in range(table.metadata.num_row_groups):
                    facts = table.metadata.row_group(group)
                    rows.append(facts.num_rows)
                    self._groups.append((number, group))
                    for at in range(facts.num_columns):
                        part = facts.column(at)
                        start = min(
                            part.data_page_offset, part.dictionary_page_offset or part.data_page_offset
                        )
                        self._spans.append((file, start, part.total_compressed_size))
                        largest = max(largest, part.total_uncompressed_size)
        if largest > _LARGEST_GROUP:
            raise ValueError(f"{files[0]} has row groups of {largest:,} bytes; write it with smaller ones")
        self.at_random = largest <= _CACHED
        self._ends = np.cumsum(rows)
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def load(self, index: int) -> bytes:
        """See `Reader`."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        with self._lock:
            rows = self._rows(group)
        row = rows[index - int(self._ends[group])].as_py()  # counted from the end of the group
        data = row.get("bytes") if isinstance(row, dict) else row
        if not isinstance(data, bytes):
            raise BrokenImage("its row holds no bytes")
        return data

    def _rows(self, group: int) -> Any:
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        number, own = self._groups[group]
        try:
            with damaged_if_unreadable(self.files[number]), _opened(self.files[number]) as table:
                rows = table.read_row_group(own, columns=[self.column], use_threads=False).column(0)
        except ValueError as error:
            raise BrokenImage(str(error)) from None
        self._kept[group] = rows
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _CACHED:
            self._kept.popitem(last=False)
        return rows

    def samples(self) -> Iterator[bytes]:
        """See `Reader`. Three places of each column of each row group."""
        return span_samples(self._spans)
