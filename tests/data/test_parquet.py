"""Parquet files of the hub: which columns are read, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openpae.data import parquet
from openpae.data.decode import BrokenImage
from openpae.data.images import open_images
from tests.data.form_files import CLASSES, pictures
from tests.data.form_files import parquet as hub_folder

ROWS = [{"image": data, "label": label} for _, label, data in pictures()][::20]


def written(path: Path, rows: list[dict[str, Any]], features: dict[str, Any] | None = None) -> Path:
    table = pa.Table.from_pylist(rows)
    if features is not None:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path)
    return path


def test_a_split_of_a_folder_is_named_or_train(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path)
    assert len(open_images(folder)) == len(open_images(f"{folder}#train")) == 60
    test = open_images(f"{folder}#test")
    assert (len(test), test.classes) == (2, CLASSES)
    assert test.name(1) == "test-00000-of-00001.parquet[1]"
    with pytest.raises(ValueError, match=r"hub has test, train; name one of them: .*hub#SPLIT"):
        open_images(f"{folder}#val")


def test_several_label_columns_need_a_choice(tmp_path: Path) -> None:
    rows = [{**row, "coarse": 0, "fine": 1} for row in ROWS]
    for row in rows:
        del row["label"]
    features = {
        "image": {"_type": "Image"},
        "coarse": {"_type": "ClassLabel", "names": ["animal"]},
        "fine": {"_type": "ClassLabel", "names": ["cat", "dog"]},
    }
    path = written(tmp_path / "c.parquet", rows, features)
    with pytest.raises(ValueError, match="has the label columns coarse, fine; name one: SOURCE#SPLIT#COLUMN"):
        open_images(path)
    assert open_images(f"{path}##fine").classes == ["cat", "dog"]
    assert open_images(f"{path}##coarse").classes == ["animal"]
    with pytest.raises(ValueError, match=r"has no column none; it has image, coarse, fine"):
        open_images(f"{path}##none")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "a", "label": 0}], "must have one column of images, got none of the columns text, label"),
        ([{"image": b"a", "img": b"b"}], "must have one column of images, got image, img"),
        ([{"image": "a.jpg", "label": 0}], "the column image of .* must hold encoded images, got string"),
        ([{"image": b"a", "label": None}], "has 1 rows without a label in label"),
        ([{"image": b"a", "label": -1}], "has the label -1"),
    ],
)
def test_tables_without_labelled_images_are_refused(
    rows: list[dict[str, Any]], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        open_images(written(tmp_path / "t.parquet", rows))


def test_rows_without_labels_are_of_one_class(tmp_path: Path) -> None:
    source = open_images(written(tmp_path / "t.parquet", [{"image": row["image"]} for row in ROWS]))
    assert (source.classes, source.labels.tolist()) == (["all"], [0, 0, 0])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "t.parquet", ROWS)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(ValueError, match=r"t.parquet is damaged: .*; copy or download it again") as caught:
        open_images(path)
    assert "\n" not in str(caught.value)
    empty = written(tmp_path / "t.parquet", [{"image": None, "label": 0}, *ROWS])
    with pytest.raises(BrokenImage, match=r"t.parquet\[0\] cannot be decoded: its row holds no bytes"):
        open_images(empty).read(0)
    image = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = image.dictionary_page_offset or image.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 16] = b"\xff" * 16
    path.write_bytes(data)
    with pytest.raises(BrokenImage, match=r"t.parquet\[1\] cannot be decoded: .* is damaged"):
        open_images(path).read(1)


def test_files_with_other_classes_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["a", "b", "c"], ["a", "c", "b"])):
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        written(tmp_path / f"train-0000{number}-of-00002.parquet", ROWS, features)
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet has other columns or classes than"):
        open_images(tmp_path)


def test_large_row_groups_can_only_be_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "t.parquet", ROWS)
    monkeypatch.setattr(parquet, "_CACHED", 100)
    with pytest.raises(ValueError, match=r"can only be read in order; pack it first: pae pack"):
        open_images(path)
    monkeypatch.setattr(parquet, "_LARGEST_GROUP", 100)
    with pytest.raises(ValueError, match=r"has row groups of [\d,]+ bytes; write it with smaller ones"):
        open_images(path)


def test_row_groups_that_are_kept_take_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_images(hub_folder(tmp_path))
    monkeypatch.setattr(parquet, "_CACHED", 20_000)
    sizes = []
    for index in (0, 59, 1, 30, 58, 2):
        source.read(index)
        kept = source.reader._kept  # type: ignore[attr-defined]
        sizes.append(sum(rows.nbytes for rows in kept.values()) if len(kept) > 1 else 0)
    assert max(sizes) <= 20_000


def test_without_its_package_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "t.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs pyarrow; install it with: pip install openpae\[data\]"
    ):
        open_images(path)
