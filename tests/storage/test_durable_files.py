"""What a power cut may not lose: content is on the disk before it gets its name, and then the name is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openpae.storage.files import atomic_file, atomic_folder, write_json

Event = tuple[str, str]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Event]:
    """(sync or rename, path below tmp_path), in order; a rename is named by its target."""
    found: list[Event] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def name(path: object) -> str:
        return str(Path(str(path)).resolve().relative_to(tmp_path.resolve()))

    def syncing(fd: int) -> None:
        found.append(("sync", name(os.readlink(f"/proc/self/fd/{fd}"))))
        sync(fd)

    def renaming(old: str | Path, new: str | Path, **options: int) -> None:
        found.append(("rename", name(new)))
        rename(old, new, **options)

    def replacing(old: str | Path, new: str | Path, **options: int) -> None:
        found.append(("rename", name(new)))
        replace(old, new, **options)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(os, "replace", replacing)
    return found


def check_order(events: list[Event], target: str, content: set[str]) -> None:
    """All content is synced under the partial name, then renamed, then the parent folder is synced."""
    at = events.index(("rename", target))
    before = {path for what, path in events[:at] if what == "sync"}
    partial = {path for path in before if path.startswith(".")}
    assert {"/".join(path.split("/")[1:]) for path in partial} >= content, events
    assert ("sync", ".") in events[at + 1 :], events


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_is_on_the_disk_before_its_name(events: list[Event], tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "a.txt").write_text("old")
    with atomic_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert not events
    check_order(events, "a.txt", {""})


def test_json_is_written_so(events: list[Event], tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    check_order(events, "a.json", {""})


@pytest.mark.parametrize("exists", [False, True])
def test_every_file_of_a_folder_is_on_the_disk_before_its_name(
    events: list[Event], tmp_path: Path, exists: bool
) -> None:
    """Those in folders below, and these folders."""
    if exists:
        (tmp_path / "run").mkdir()
    with atomic_folder(tmp_path / "run") as partial:
        (partial / "deep" / "deeper").mkdir(parents=True)
        for name in ("a", "deep/b", "deep/deeper/c"):
            (partial / name).write_text(name)
    check_order(events, "run", {"", "a", "deep", "deep/b", "deep/deeper", "deep/deeper/c"})
