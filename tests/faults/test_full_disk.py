"""A disk that fills up while something is saved: what was there stays, nothing half-written does, and the
error says what to free."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from children import run_in_child
from safetensors.torch import save_file

from openpae.storage import DiskFull, told_if_full, whole_file, whole_folder, write_json

NUMBERS = {"a": torch.arange(20_000.0), "b": torch.arange(3.0)}


def save_numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, NUMBERS["a"].numpy())


WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.save(NUMBERS, path),
    "safetensors": lambda path: save_file(NUMBERS, path),
    "numpy": save_numpy,
    "python": lambda path: path.write_bytes(bytes(80_000)),
}


@pytest.mark.parametrize("limit", [0, 10, 5_000, 65_000])
@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_writes_the_error_is_one_and_the_old_content_stays(
    tmp_path: Path, writer: str, limit: int
) -> None:
    """torch says "unexpected pos", NumPy "1000 requested and 3 written", safetensors "os error 27"."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "a").write_text("old")

    def write_file() -> None:
        with whole_file(file) as partial:
            WRITERS[writer](partial)

    def write_folder() -> None:
        with whole_folder(folder) as partial:
            (partial / "first").touch()
            WRITERS[writer](partial / "a")

    for action, target in ((write_file, file), (write_folder, folder)):
        ended = run_in_child(action, largest_file=limit)
        assert ended.error.startswith(f"DiskFull: no room for {target}: "), ended.trace
        for part in (
            "bytes of it and no more",
            "bytes are free on that disk",
            "free some",
            "run the same command",
        ):
            assert part in ended.error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file", "folder"]
    assert file.read_text() == (folder / "a").read_text() == "old"


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_file(tmp_path / "a") as partial:
            torch.save(NUMBERS, partial)
            raise RuntimeError("unexpected pos 832 vs 790")

    ended = run_in_child(fail, largest_file=10_000_000)
    assert ended.error == "RuntimeError: unexpected pos 832 vs 790"
    with pytest.raises(PermissionError), whole_folder(tmp_path / "b"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_systems_three_numbers_are_known(tmp_path: Path, code: int) -> None:
    """Also behind another error, as where torch writes to a file object of Python."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            raise OSError(code, "no")

    with (
        pytest.raises(DiskFull, match=r"no room for .*a: .* took 0 bytes of it"),
        told_if_full(tmp_path / "a"),
    ):
        torch.save(NUMBERS, Full())  # type: ignore[arg-type]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    ended = run_in_child(lambda: write_json(tmp_path / "a.json", {"a": "x" * 1000}), largest_file=500)
    assert ended.error.startswith("DiskFull: no room for ")
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'
