"""Labels of a flat folder in a file of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from openpae.data.images import open_images
from tests.data.form_files import ground_truth, pictures

JPEG = next(pictures())[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "val").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "val" / name).write_bytes(JPEG)
    return tmp_path / "val"


@pytest.mark.parametrize(
    ("name", "text", "classes", "labels"),
    [
        ("l.csv", "a.jpg,dog\nb.jpg,cat\nc.jpg,dog\n", ["cat", "dog"], [1, 0, 1]),
        (
            "l.csv",
            "\ufefflabel,extra,file_name\r\n1,x,./c.jpg\r\n0,x,a.jpg\r\n0,x,b.jpg\r\n",
            ["0", "1"],
            [0, 0, 1],
        ),
        (
            "l.csv",
            "ImageId,PredictionString\na,n2 1 2 3 4\nb,n1 1 1 2 2 n1 3 3 4 4\nc,n2 5 6 7 8\n",
            ["n1", "n2"],
            [1, 0, 1],
        ),
        ("l.tsv", "a.jpg\tbig cat\nb.jpg\tdog\nc.jpg\tdog", ["big cat", "dog"], [0, 1, 1]),
        ("l.csv", 'a.jpg,"tench, fish"\nb.jpg,dog\nc.jpg,dog', ["dog", "tench, fish"], [1, 0, 0]),
        ("l.txt", "a.jpg 2\nb.jpg 0\nc.jpg 0\n", ["0", "1", "2"], [2, 0, 0]),
        ("l.txt", "2\n1\n2\n", ["1", "2"], [1, 0, 1]),
    ],
)
def test_tables_and_lists_are_read(
    name: str, text: str, classes: list[str], labels: list[int], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    source = open_images(f"{folder}#{tmp_path / name}")
    assert (source.classes, source.labels.tolist()) == (classes, labels)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("l.csv", "a.jpg,x\nb.jpg,x\n", "has no label for 1 images of .*val, such as c.jpg"),
        ("l.csv", "a.jpg,x\nb.jpg,x\nc.jpg,x\nd.jpg,x", "has a label for d.jpg, which is not in .*val"),
        ("l.csv", "a.jpg,x\nb.jpg,x\nc.jpg,x\na.jpg,y", "has two labels for a.jpg"),
        ("l.csv", "a.jpg,x\nb.jpg\nc.jpg,x", "has a line without a label: b.jpg"),
        ("l.csv", "a.jpg,1\n../val/b.jpg,1\nc.jpg,1", r"has a label for ../val/b.jpg, which is not in"),
        ("l.csv", "", "holds no labels"),
        ("l.txt", "1\n2\n", "has 2 labels for 3 images; it needs one for each"),
        ("l.txt", "0\n1\n2\n", "has labels from 0 to 2; without file names they count from 1"),
        ("l.csv", "a.jpg,\udcff".encode("utf-8", "surrogateescape"), "l.csv is damaged"),
        ("l.dat", "a.jpg,1", "holds no parquet files with a split"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    name: str, text: str | bytes, says: str, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=says):
        open_images(f"{folder}#{file}")


def test_a_label_file_must_exist(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no label file at none.csv, nor in .*val"):
        open_images(f"{folder}#none.csv")


def test_meta_mat_must_know_each_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ground_truth(tmp_path)
    truth = tmp_path / "truth.txt"
    truth.write_text(truth.read_text().replace("2", "4"))  # an inner node of the tree
    with pytest.raises(ValueError, match=r"truth.txt has the label 4, which .*meta.mat does not know"):
        open_images(path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"meta.mat needs SciPy; install it with: pip install openpae"
    ):
        open_images(path)


def test_names_beside_the_file_name_the_numbers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("2\n1\n2\n")
    (tmp_path / "classes.txt").write_text("zebra\n\nape\n")
    source = open_images(f"{folder}#{tmp_path / 'l.txt'}")
    assert (source.classes, source.labels.tolist()) == (["zebra", "ape"], [1, 0, 1])
    (tmp_path / "classes.txt").write_text("ape\nape\n")
    with pytest.raises(ValueError, match=r"classes.txt must hold one distinct class name a line"):
        open_images(f"{folder}#{tmp_path / 'l.txt'}")
    (tmp_path / "classes.txt").write_text("ape\n")
    with pytest.raises(ValueError, match=r"l.txt has the label 1; labels must be 0 to 0"):
        open_images(f"{folder}#{tmp_path / 'l.txt'}")
