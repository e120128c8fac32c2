"""Files and folders appear whole or not at all, wherever the process is killed; fingerprints name content."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openpae.storage.files import (
    atomic_file,
    atomic_folder,
    file_hash,
    fingerprint,
    read_fields,
    read_json,
    write_json,
)
from tests.conftest import kill_points


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder and its content."""
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def write_pair(folder: Path, text: str) -> None:
    """A folder of two files, one of them deeper."""
    with atomic_folder(folder) as partial:
        (partial / "a").write_text(text)
        (partial / "deep").mkdir()
        (partial / "deep" / "b").write_text(text)


def test_a_file_is_never_half_written(tmp_path: Path) -> None:
    """Killed at any moment, the file holds the old content or the new one, and the next write succeeds."""
    file, deaths = tmp_path / "file.json", 0
    write_json(file, {"version": 1})
    for _ in kill_points(lambda: write_json(file, {"version": 2}), tmp_path):
        assert read_json(file) in ({"version": 1}, {"version": 2})
        write_json(file, {"version": 1})
        assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
        deaths += 1
    assert deaths >= 2  # before it was opened, and before it was moved into place
    assert read_json(file) == {"version": 2}


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_is_never_half_written(tmp_path: Path, existed: bool) -> None:
    folder, deaths = tmp_path / "at" / "folder", 0
    old, new = ({"a": text, "deep/b": text} for text in ("old", "new"))
    if existed:
        write_pair(folder, "old")
    for _ in kill_points(lambda: write_pair(folder, "new"), tmp_path):
        assert not folder.exists() or tree(folder) in ([old, new] if existed else [new])
        write_pair(folder, "third")
        assert tree(folder) == {"a": "third", "deep/b": "third"}
        assert [path.name for path in folder.parent.iterdir()] == [
            "folder"
        ]  # and nothing is left lying about
        shutil.rmtree(tmp_path / "at")
        if existed:
            write_pair(folder, "old")
        deaths += 1
    assert deaths >= 6
    assert tree(folder) == new


def test_a_folder_killed_while_it_was_replaced_comes_back(tmp_path: Path) -> None:
    """If the next writer fails as well, what stood there before the kill must not be lost."""
    folder = tmp_path / "folder"
    write_pair(folder, "old")
    lost = False
    for _ in kill_points(lambda: write_pair(folder, "new"), tmp_path):
        lost |= not folder.exists()
        with pytest.raises(ZeroDivisionError), atomic_folder(folder):
            1 / 0  # noqa: B018
        assert tree(folder)["a"] in ("old", "new")
        write_pair(folder, "old")
    assert lost  # or this test has not seen the instant that it is about


def test_what_fails_leaves_what_was(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    write_pair(folder, "old")
    with pytest.raises(ZeroDivisionError), atomic_file(file) as partial:
        partial.write_text(str(1 / (partial.write_text("new") - 3)))
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as partial:
        (partial / "b").write_text(str(1 / ((partial / "a").write_text("new") - 3)))
    assert tree(tmp_path) == {"file": "old", "folder/a": "old", "folder/deep/b": "old"}


def test_files_of_a_replaced_folder_do_not_linger(tmp_path: Path) -> None:
    write_pair(tmp_path / "folder", "old")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "c").write_text("new")
    assert tree(tmp_path) == {"folder/c": "new"}


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.floats(allow_nan=False)))
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    write_json(file, data)
    assert read_json(file) == data


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "got list"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file.json is damaged: .*{reason}"):
        read_json(file)


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content" * 100_000)
    assert file_hash(tmp_path / "file") == hashlib.sha256(b"content" * 100_000).hexdigest()


def test_fingerprint_does_not_see_order_layout_or_gradients() -> None:
    x, y = torch.randn(3, 4), torch.randn(5)
    expected = fingerprint({"x": x, "y": y}, "fact")
    assert fingerprint({"y": y, "x": x}, "fact") == expected
    assert fingerprint({"x": x.T.contiguous().T, "y": y}, "fact") == expected
    assert fingerprint({"x": x.clone().requires_grad_(), "y": y}, "fact") == expected
    assert len(expected) == 16
    assert int(expected, 16) >= 0


def test_fingerprint_sees_everything_else() -> None:
    """One bit, a name, a type, a shape, a fact, and where one ends and the next begins."""
    x = torch.arange(6.0)
    flipped = x.clone()
    flipped.view(torch.uint8)[0] ^= 1
    zero = torch.zeros(1)
    prints = [
        fingerprint({"x": x}),
        fingerprint({"x": flipped}),
        fingerprint({"y": x}),
        fingerprint({"x": x.view(2, 3)}),
        fingerprint({"x": x.view(torch.int32)}),
        fingerprint({"x": x}, "fact"),
        fingerprint({"x": x}, "fact", ""),
        fingerprint({"x": x}, "", "fact"),
        fingerprint({"x": x}, "fact\0"),
        fingerprint({"x": x, "z": torch.empty(0)}),
        fingerprint({"z": zero}),
        fingerprint({"z": -zero}),
        fingerprint({"z": torch.tensor(0.0)}),
        fingerprint({}),
        fingerprint({}, "x torch.uint8 (0,)"),
        fingerprint({"x": torch.empty(0, dtype=torch.uint8)}),
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_fingerprint_takes_every_type(dtype: torch.dtype) -> None:
    ones, zeros = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    assert fingerprint({"x": ones}) == fingerprint({"x": ones.clone()}) != fingerprint({"x": zeros})


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("{}", "count, name, seconds"),
        ('{"count": true, "name": "a", "seconds": 1}', "count"),
        ('{"count": 1.0, "name": null, "seconds": 1}', "count, name"),
        ('{"count": 1, "name": "a", "seconds": NaN}', "seconds"),
        ('{"count": 1, "name": "a", "seconds": -Infinity}', "seconds"),
        (f'{{"count": 1, "name": "a", "seconds": {10**400}}}', "seconds"),
        ('{"count": 1, "name": "a", "seconds": "1"}', "seconds"),
    ],
)
def test_fields_of_a_record_are_checked(tmp_path: Path, text: str, missing: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"a.json is damaged: it has no fitting {missing}$"):
        read_fields(file, name=str, count=int, seconds=float)
    file.write_text('{"count": 1, "name": "a", "seconds": 2, "more": 3}')
    assert read_fields(file, name=str, count=int, seconds=float)["more"] == 3
