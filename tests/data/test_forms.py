"""Every form of the same 60 pictures gives the same packed bytes and the same classes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from openpae.cli import main
from openpae.data.decode import BrokenImage
from openpae.data.forms import KNOWN_FORMS
from openpae.data.images import ImageFolder, PackedImages, open_images, open_source
from openpae.data.packing import pack_images
from openpae.data.settings import ImageData
from openpae.data.training import TrainingImages, open_training
from tests.data.form_files import CLASSES, FORMS, PER_CLASS, arrays, class_folders, tar_of_folders
from tests.engine.group import together


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    root = tmp_path_factory.mktemp("reference")
    return pack_images(ImageFolder(class_folders(root)), root / "packed", size=16)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_packed_bytes_and_classes(
    form: str, reference: PackedImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FORMS[form](tmp_path)
    main(["pack", str(source), str(tmp_path / "packed"), "--size", "16"])
    packed = PackedImages(tmp_path / "packed")
    assert packed.classes == reference.classes == CLASSES
    assert packed.labels.tolist() == np.repeat(range(3), PER_CLASS).tolist()
    assert packed.shards.index["sha256"] == reference.shards.index["sha256"]
    labels = "0 n01 (20), 1 n02 (20), 2 n03 (20)"
    assert f"60 images of 3 classes in {tmp_path / 'packed'}\nlabels: {labels}\n" == capsys.readouterr().out
    main(["info", str(source), "--verify"])
    assert labels in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_training_reads_each_form_at_random_in_any_process(form: str, tmp_path: Path) -> None:
    given = FORMS[form](tmp_path)
    images, held_out = open_training(ImageData(images=given, evaluation=given))
    assert held_out is not None
    there = pickle.loads(pickle.dumps(images))  # as for a process that reads data
    folder = ImageFolder(class_folders(tmp_path) if form != "class_folders" else given)
    for index in (59, 3, 31, 4):
        assert images.read(index).tobytes() == there.read(index).tobytes() == folder.read(index).tobytes()
    batches = [
        TrainingImages(source, size=16, seed=0, augment="crop", resize=20).__getitems__([0, 7, 100])
        for source in (there, folder)
    ]
    assert batches[0].images.equal(batches[1].images)
    assert batches[0].labels.equal(batches[1].labels)


@pytest.mark.parametrize("form", FORMS)
def test_fingerprints_are_those_of_the_content(form: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, second = (FORMS[form](tmp_path / name) for name in ("first", "second"))
    prints = [open_source(path, full_hash=True).fingerprint() for path in (first, second)]
    if "tar" in form or "wds" in form or form in ("class_folders", "csv_labels", "numbered_labels", "npz"):
        assert prints[0] == prints[1]
    assert prints[0].startswith(open_source(first).fingerprint() + ".")
    assert len(prints[0]) == 50  # three parts


def test_an_interrupted_pack_goes_on(
    reference: PackedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar_of_folders(tmp_path)
    source = open_source(path)
    read = source.read
    monkeypatch.setattr(source, "read", lambda i: read(i) if i < 40 else _stop())
    with pytest.raises(KeyboardInterrupt):
        pack_images(source, tmp_path / "packed", size=16, per_shard=16)
    done = sorted(file.name for file in (tmp_path / "packed").glob("*.npy"))
    assert done == ["00000.npy", "00001.npy"]
    read_again: list[int] = []
    again = open_source(path)
    monkeypatch.setattr(again, "read", lambda i: (read_again.append(i), read(i))[1])
    packed = pack_images(again, tmp_path / "packed", size=16, per_shard=16)
    assert min(read_again) == 32
    rows = np.arange(60)
    assert packed.shards.gather(rows).equal(reference.shards.gather(rows))


def _stop() -> None:
    raise KeyboardInterrupt


def test_broken_members_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tar_of_folders(tmp_path)
    source = open_source(path)
    assert isinstance(source.reader.starts, np.ndarray)  # type: ignore[union-attr]
    start = int(source.reader.starts[5])  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"no JPEG")
    name = f"{path}/train/n01/005.jpg"
    with pytest.raises(BrokenImage, match=f"{name} cannot be decoded: no known image format"):
        open_source(path).read(5)
    arguments = ["pack", str(path), str(tmp_path / "packed"), "--size", "16", "--skip-broken"]
    main(arguments)
    out = capsys.readouterr().out
    assert "59 images of 3 classes" in out
    assert f"left out 1 broken files: {name} cannot be decoded" in out


def test_a_form_that_is_unknown_or_compressed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data.h5").write_bytes(b"\x89HDF" + bytes(600))
    (tmp_path / "data.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(
        ValueError, match=r"data.h5 is in no form that is read; known: class folders, FOLDER#"
    ):
        open_images(tmp_path / "data.h5")
    assert "hf:OWNER/NAME#SPLIT" in KNOWN_FORMS
    with pytest.raises(ValueError, match=r"data.tar.gz is compressed with gzip, .* unpack it"):
        open_images(tmp_path / "data.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"no image folder at .*none.tar"):
        open_images(tmp_path / "none.tar")


def test_what_can_only_be_read_in_order_is_packed_first(reference: PackedImages, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "small.npz", **arrays())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"can only be read in order; pack it first: pae pack .*small.npz OUT"
    ):
        open_training(ImageData(images=tmp_path / "small.npz"))
    packed = pack_images(open_source(tmp_path / "small.npz"), tmp_path / "packed", size=16)
    assert packed.shards.index["sha256"] == reference.shards.index["sha256"]
    assert packed.classes == CLASSES


def test_shards_of_a_pattern_must_all_be_there(tmp_path: Path) -> None:
    FORMS["wds_numbers"](tmp_path)
    with pytest.raises(FileNotFoundError, match=r"1 shards of .*\{000..004\}.tar are absent, such as .*004"):
        open_images(tmp_path / "shards" / "{000..004}.tar")
    with pytest.raises(ValueError, match="must count up, to at most 100,000 shards"):
        open_images(tmp_path / "shards" / "{004..000}.tar")


def test_a_path_with_a_sign_in_its_name_is_that_path(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a#b").symlink_to(image_folder)
    assert open_images(tmp_path / "a#b").classes == ["boxes", "discs"]
    with pytest.raises(
        ValueError, match=r"holds no parquet files with a split b; a label file ends with .csv"
    ):
        open_images(f"{image_folder}#b")


def packed_here(source: Path, out: Path) -> list[str]:
    return pack_images(open_source(source), out, size=16, per_shard=8).shards.index["sha256"]


def test_two_processes_pack_what_one_does(tmp_path: Path) -> None:
    path = tar_of_folders(tmp_path)
    jobs = {"pack": (packed_here, path, tmp_path / "two")}
    assert together(2, tmp_path / "group", jobs)["pack"] == [packed_here(path, tmp_path / "one")] * 2
