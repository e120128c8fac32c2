"""Tars and zips: grouped as folders are, and refused where a name, link or size is not that of images."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from openpae.data.archives import open_tars, open_zip
from openpae.data.decode import BrokenImage
from openpae.data.records import LARGEST_IMAGE
from tests.data.form_files import add, edm2_zip, pictures, tar_of_folders

JPEG = next(pictures())[2]


def tar(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            add(archive, name, JPEG)
    return path


def linked(archive: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("cat/1.jpg")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(info)


def huge(archive: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("cat/1.jpg")
    info.size = LARGEST_IMAGE + 1
    archive.addfile(info)


def nested(archive: tarfile.TarFile) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        add(tar, "deep.tar", bytes(1024))
    add(archive, "a.tar", inner.getvalue())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda archive: add(archive, "../1.jpg", JPEG), "holds the name '../1.jpg'; names must stay inside"),
        (lambda archive: add(archive, "/root/1.jpg", JPEG), "holds the name '/root/1.jpg'"),
        (lambda archive: add(archive, "a\\1.jpg", JPEG), r"holds the name 'a\\\\1.jpg'"),
        (linked, "holds cat/1.jpg, a link, device or sparse file"),
        (huge, "holds cat/1.jpg of 1,073,741,825 bytes; at most 1,073,741,824 are taken"),
        (lambda archive: add(archive, "./cat/0.jpg", JPEG), "holds cat/0.jpg twice"),
        (nested, "holds tars of tars of tars; unpack a/deep.tar first"),
    ],
)
def test_hostile_members_of_a_tar_are_refused(
    spoil: Callable[[tarfile.TarFile], object], says: str, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        add(archive, "cat/0.jpg", JPEG)
        spoil(archive)
    with pytest.raises(ValueError, match=says) as caught:
        open_tars(tmp_path / "t.tar", [tmp_path / "t.tar"])
    assert "\n" not in str(caught.value)


def test_a_damaged_tar_does_not_look_shorter(tmp_path: Path) -> None:
    path = tar_of_folders(tmp_path)
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        second = archive.getmembers()[30].offset
    path.write_bytes(data[:second] + b"?" * 512 + data[second + 512 :])
    with pytest.raises(ValueError, match=f"train.tar is damaged: byte {second:,} begins no file"):
        open_tars(path, [path])
    path.write_bytes(data[: second + 700])
    with pytest.raises(ValueError, match=r"train.tar is damaged: unexpected end of data; copy or download"):
        open_tars(path, [path])


def test_images_of_a_tar_are_grouped_as_those_of_a_folder(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", "x/b/2.jpg", "x/a-b/1.jpg", "x/a/deep/1.jpg", "x/a/.hidden/1.jpg")
    source = open_tars(path, [path])
    assert source.classes == ["a", "a-b", "b"]
    assert [source.name(i) for i in range(3)] == ["x/a/deep/1.jpg", "x/a-b/1.jpg", "x/b/2.jpg"]
    flat = tar(tmp_path / "flat.tar", "1.jpg", "2.jpg")
    assert open_tars(flat, [flat]).classes == ["all"]
    one = tar(tmp_path / "one.tar", "cat/1.jpg")
    assert open_tars(one, [one]).classes == ["cat"]
    for names, says in (
        (("1.jpg", "cat/1.jpg"), r"images both directly and in subfolders \(cat\)"),
        (("Cat/1.jpg", "cat/1.jpg"), "differ in case"),
        (("train/a/1.jpg", "val/a/1.jpg"), "holds the splits train and val"),
    ):
        bad = tar(tmp_path / "bad.tar", *names)
        with pytest.raises(ValueError, match=says):
            open_tars(bad, [bad])
    with pytest.raises(FileNotFoundError, match=r"no images in .*none.tar; known endings"):
        open_tars(tar(tmp_path / "none.tar", "notes.md"), [tmp_path / "none.tar"])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"1.cls": b"0", "2.jpg": JPEG}, "has no label for 1 images, such as 2.jpg"),
        ({"1.png": JPEG, "1.cls": b"0"}, "two images of one sample: 1.jpg and 1.png; keep one"),
        ({"1.cls": b"-1", "2.jpg": JPEG, "2.cls": b"3"}, "label -1; labels must be 0 to 1$"),
        ({"1.cls": b"9999999"}, "has the label 9999999; labels must be 0 to"),
        ({"1.json": b'{"label": 1'}, "t.tar/1.json is no JSON"),
        ({"1.cls": b"0" * (2**20 + 1)}, "holds the label file 1.cls of 1,048,577 bytes"),
        (
            {"1.json": b'{"label": 0}', "2.jpg": JPEG, "2.json": b"{}"},
            "no label for 2.jpg; its JSON needs",
        ),
    ],
)
def test_labels_of_shards_that_do_not_fit_are_refused(
    files: dict[str, bytes], says: str, tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n") if b"-1" in files.values() else None
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, data in {"1.jpg": JPEG, **files}.items():
            add(archive, name, data)
    with pytest.raises(ValueError, match=says):
        open_tars(tmp_path / "t.tar", [tmp_path / "t.tar"])


def test_other_json_beside_the_images_is_no_label(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name in ("cat/1", "dog/1"):
            add(archive, f"{name}.jpg", JPEG)
            add(archive, f"{name}.json", b'{"caption": "a cat"}')
    assert open_tars(tmp_path / "t.tar", [tmp_path / "t.tar"]).classes == ["cat", "dog"]


def zipped(path: Path, files: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:  # type: ignore[arg-type]
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_hostile_members_of_a_zip_are_refused(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "bomb.zip", {"a/1.bmp": bytes(2**24 + 1)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a/1.bmp, [\d,]+ bytes that would become 16,777,217; zip it again"):
        open_zip(bomb)
    with pytest.raises(ValueError, match=r"holds the name '../1.jpg'"):
        open_zip(zipped(tmp_path / "out.zip", {"../1.jpg": JPEG}))
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        info = zipfile.ZipInfo("a/1.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match=r"holds a/1.jpg, a link"):
        open_zip(tmp_path / "link.zip")
    with pytest.raises(ValueError, match="in a rare compression"):
        open_zip(zipped(tmp_path / "rare.zip", {"a/1.jpg": JPEG}, compression=zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a/1.jpg", JPEG)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/1.jpg", JPEG)
    with pytest.raises(ValueError, match=r"holds a/1.jpg twice"):
        open_zip(tmp_path / "twice.zip")
    cut = edm2_zip(tmp_path)
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"edm2.zip is damaged: File is not a zip file"):
        open_zip(cut)


def test_members_of_a_zip_do_not_share_bytes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "z.zip", {"a/1.jpg": JPEG, "a/2.jpg": JPEG})
    data = bytearray(path.read_bytes())
    last = data.rindex(b"PK\1\2")
    data[last + 42 : last + 46] = bytes(4)  # the second entry claims the place of the first
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"holds a/1.jpg and a/2.jpg in the same bytes"):
        open_zip(path)


def test_a_flipped_bit_in_a_zip_is_a_broken_image(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = zipped(tmp_path / "z.zip", {"a/1.jpg": JPEG}, compression=method)
        data = bytearray(path.read_bytes())
        data[200] ^= 16
        path.write_bytes(data)
        with pytest.raises(BrokenImage, match=r"z.zip/a/1.jpg cannot be decoded: "):
            open_zip(path).read(0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "dataset.json is no JSON"),
        ('{"labels": {"1.jpg": 0}}', r"dataset.json must hold \{.labels.: "),
        ('{"labels": []}', "must hold"),
        ('{"labels": [["1.jpg", 0.5]]}', "must hold"),
        ('{"labels": [["1.jpg", -1]]}', "has the label -1"),
        ('{"labels": [["1.jpg", 0], ["2.jpg", 0]]}', "2.jpg is missing in the zip, as are 0 others"),
        ('{"labels": [["1.jpg", 0], ["1.jpg", 0]]}', "holds 1.jpg twice"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(content: str, says: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "z.zip", {"1.jpg": JPEG, "dataset.json": content.encode()})
    with pytest.raises(ValueError, match=says):
        open_zip(path)


def test_a_dataset_json_without_names_or_labels_is_read(tmp_path: Path) -> None:
    rows = [["b.jpg", 2], ["a.jpg", 0]]
    files = {"a.jpg": JPEG, "b.jpg": JPEG}
    numbered = {**files, "dataset.json": json.dumps({"labels": rows}).encode()}
    source = open_zip(zipped(tmp_path / "z.zip", numbered))
    assert source.classes == ["0", "1", "2"]
    assert [source.name(0), *source.labels] == ["b.jpg", 2, 0]
    source = open_zip(zipped(tmp_path / "z.zip", {**files, "dataset.json": b'{"labels": null}'}))
    assert (source.classes, source.name(0)) == (["all"], "a.jpg")
