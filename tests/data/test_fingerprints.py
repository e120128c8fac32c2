"""What the fingerprint of an image folder sees, and that older ones stay valid."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from openpae.data.fingerprints import SAMPLED_BYTES
from openpae.data.images import ImageFolder, Subset
from openpae.data.packing import pack_images
from openpae.storage.files import fingerprints_agree

SIZE = 5 * SAMPLED_BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.bmp").write_bytes(bytes([number]) * SIZE)
    return tmp_path / "images"


def change(file: Path, place: int) -> None:
    """Change a byte; size and time stay."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("place", [0, SAMPLED_BYTES - 1, SIZE // 2, SIZE - SAMPLED_BYTES, SIZE - 1])
def test_a_replaced_file_of_the_same_size_is_seen_at_its_ends_and_in_the_middle(
    folder: Path, place: int
) -> None:
    before = ImageFolder(folder).fingerprint()
    change(folder / "1.bmp", place)
    after = ImageFolder(folder).fingerprint()
    assert not fingerprints_agree(before, after)
    assert before.split(".")[0] == after.split(".")[0]


def test_what_lies_between_is_seen_where_it_is_asked_for(folder: Path) -> None:
    before, whole = ImageFolder(folder).fingerprint(), ImageFolder(folder, full_hash=True).fingerprint()
    change(folder / "1.bmp", SAMPLED_BYTES)
    assert ImageFolder(folder).fingerprint() == before
    after = ImageFolder(folder, full_hash=True).fingerprint()
    assert not fingerprints_agree(whole, after)
    assert fingerprints_agree(before, after)
    assert fingerprints_agree(after, before)


def test_a_copy_has_the_same_fingerprint_whatever_its_times(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    os.utime(copy / "0.bmp", (1, 1))
    first, second = (ImageFolder(path, full_hash=True) for path in (folder, copy))
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize("full_hash", [False, True])
def test_a_file_that_cannot_be_read_is_left_to_whoever_decodes_it(folder: Path, full_hash: bool) -> None:
    os.symlink("/proc/self/mem", folder / "9.bmp")
    parts = ImageFolder(folder, full_hash=full_hash).fingerprint().split(".")
    assert [len(part) for part in parts] == [16] * (3 if full_hash else 2)


def test_rows_of_a_folder_agree_as_the_folder_does(folder: Path) -> None:
    rows = [Subset(ImageFolder(folder), rows).fingerprint() for rows in ([0, 1], [0, 2])]
    assert not fingerprints_agree(*rows)
    change(folder / "0.bmp", 0)
    after = Subset(ImageFolder(folder), [0, 1]).fingerprint()
    assert not fingerprints_agree(rows[0], after)
    assert fingerprints_agree(rows[0].split(".")[0], after)


def test_a_folder_packed_by_an_older_version_goes_on_and_one_that_changed_does_not(
    image_folder: Path, tmp_path: Path
) -> None:
    source, packed = ImageFolder(image_folder), tmp_path / "packed"
    pack_images(source, packed, size=16, per_shard=4)
    header = json.loads((packed / "header.json").read_text())
    old = header["attributes"]["source"].split(".")[0]
    header["attributes"]["source"] = old
    (packed / "header.json").write_text(json.dumps(header))
    for name in ("index.json", "labels.npy", "00001.npy"):
        (packed / name).unlink()
    pack_images(source, packed, size=16, per_shard=4).shards.verify()
    copy = Path(shutil.copytree(image_folder, tmp_path / "copy"))
    pack_images(ImageFolder(copy), tmp_path / "again", size=16)
    change(copy / "boxes" / "0.png", 40)
    with pytest.raises(ValueError, match=r"was begun with another attributes.source"):
        pack_images(ImageFolder(copy), tmp_path / "again", size=16)
