"""What may be written where: ownership, inputs, links, and one process a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from openpae.storage.files import atomic_file, atomic_folder, read_json, remove_folder, resolved
from openpae.storage.outputs import INDEX, check_claim, check_outputs, claim, locked, make_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_new_or_ours_may_be_written(here: Path) -> None:
    Path("old.json").write_text("{}")
    check_outputs(Path("new.json"), Path("old.json"), own=[here / "old.json"])
    check_outputs(Path("old.json"), overwrite=True)
    check_outputs(into=here, inputs=[Path("absent")])


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file", "link to a folder"])
def test_what_exists_and_is_not_ours_is_spared(here: Path, kind: str) -> None:
    Path("photos").mkdir()
    Path("notes").write_text("mine")
    match kind:
        case "file":
            Path("target").write_text("mine")
        case "folder":
            Path("target").mkdir()
        case "link to a file":
            Path("target").symlink_to("notes")
        case _:
            Path("target").symlink_to("photos")
    with pytest.raises(ValueError, match=r"^target exists and was not made by this"):
        check_outputs(Path("target"))
    with pytest.raises(ValueError, match=r", or add --overwrite$"):
        check_outputs(Path("target"), overwrite=False)


@pytest.mark.parametrize(
    ("target", "relation"),
    [
        ("data", "is"),
        ("data/a/b", "lies in"),
        ("link", "is"),
        ("link/a", "lies in"),
        ("a/../data/c", "lies in"),
    ],
)
@pytest.mark.parametrize("overwrite", [None, False, True])
def test_nothing_is_written_into_an_input(
    here: Path, target: str, relation: str, overwrite: bool | None
) -> None:
    Path("data/a").mkdir(parents=True)
    Path("a").mkdir()
    Path("link").symlink_to("data")
    for targets, into in (((Path(target),), None), ((), Path(target))):
        with pytest.raises(ValueError, match=f"{relation} data, which is read; name another place"):
            check_outputs(*targets, into=into, inputs=[Path("data")], overwrite=overwrite)


def test_a_target_that_holds_an_input_is_refused_but_a_folder_may_hold_both(here: Path) -> None:
    Path("all/images").mkdir(parents=True)
    with pytest.raises(ValueError, match="all holds all/images, which is read"):
        check_outputs(Path("all"), inputs=[Path("all/images")], overwrite=True)
    check_outputs(Path("all/samples"), into=Path("all"), inputs=[Path("all/images")])


def test_a_file_is_no_folder(here: Path) -> None:
    Path("notes").write_text("mine")
    for attempt in (
        lambda: check_outputs(Path("notes/out")),
        lambda: check_outputs(into=Path("notes")),
        lambda: make_folder(Path("notes/out")),
    ):
        with pytest.raises(NotADirectoryError, match="notes"):
            attempt()
    with (
        pytest.raises(NotADirectoryError, match="is a file, but a folder is to be written"),
        atomic_folder(Path("notes")),
    ):
        pass
    Path("folder").mkdir()
    with (
        pytest.raises(IsADirectoryError, match="is a folder, but a file is to be written"),
        atomic_file(Path("folder")),
    ):
        pass
    assert Path("notes").read_text() == "mine"


def test_a_claim_is_kept_and_does_not_reach_further(here: Path) -> None:
    out = Path("out")
    claim(out, ["a.png"], inputs=[])
    Path("out/a.png").write_text("ours")
    Path("out/b.png").write_text("mine")
    claim(out, ["a.png"], inputs=[])
    with pytest.raises(ValueError, match=r"^out/b.png exists"):
        claim(out, ["a.png", "b.png"], inputs=[])
    assert read_json(out / INDEX) == {"files": ["a.png"]}
    assert check_claim(out, ["b.png"], inputs=[], overwrite=True) == ["a.png", "b.png"]


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', '{"files": [3, null]}', '{"files": ["../x"]}'])
def test_a_damaged_index_claims_nothing(here: Path, content: str) -> None:
    Path("out").mkdir()
    Path("out", INDEX).write_text(content)
    Path("out/a.png").write_text("mine")
    with pytest.raises(ValueError, match=r"^out/a.png exists"):
        claim(Path("out"), ["a.png"], inputs=[])


@pytest.mark.parametrize("content", ["{}", '{"files": ["a.png"]}', None])
def test_an_index_is_no_link(here: Path, content: str | None) -> None:
    Path("out").mkdir()
    Path("out", INDEX).symlink_to(here / "notes")
    if content is not None:
        Path("notes").write_text(content)
    with pytest.raises(
        ValueError, match=rf"^out/{re.escape(INDEX)} must be a file .* got a link; remove it$"
    ):
        claim(Path("out"), ["a.png"], inputs=[])
    assert (Path("notes").read_text() if Path("notes").exists() else None) == content


def test_a_folder_is_held_by_one(here: Path) -> None:
    Path("link").symlink_to("out")
    second = locked(Path("link"), "sampling")
    message = "^another process is sampling in link; wait for it, stop it, or name another folder$"
    with locked(Path("out"), "sampling"), pytest.raises(ValueError, match=message):
        second.__enter__()
    with locked(Path("out"), "sampling"):
        pass


def test_a_lock_is_no_link(here: Path) -> None:
    Path("out").mkdir()
    Path("notes").write_text("mine")
    Path("out/.lock").symlink_to(here / "notes")
    with (
        pytest.raises(ValueError, match=r"out/.lock must be a lock file, got a link"),
        locked(Path("out"), "sampling"),
    ):
        pass
    assert Path("notes").read_text() == "mine"


@pytest.mark.parametrize("name", [".target.openpae-partial", ".target.openpae-old"])
def test_planted_links_are_not_followed(here: Path, name: str) -> None:
    Path("mine").mkdir()
    Path("mine/notes").write_text("mine")
    for source in ("mine", "mine/notes"):
        Path(name).symlink_to(here / source)
        with atomic_file(Path("target")) as partial:
            assert not partial.is_symlink()
            partial.write_text("ours")
        Path("target").unlink()
        Path(name).unlink(missing_ok=True)
        Path(name).symlink_to(here / source)
        with atomic_folder(Path("target")) as partial:
            assert not partial.is_symlink()
            (partial / "a").write_text("ours")
        remove_folder(Path("target"))
        assert Path("mine/notes").read_text() == "mine"
        assert not os.path.lexists(name)


@pytest.mark.parametrize("name", [".target.partial", ".target.old", ".target.removed", "target.partial"])
def test_files_of_other_programs_stay(here: Path, name: str) -> None:
    """rsync, browsers and editors use such names, too."""
    Path(name).mkdir()
    Path(name, "notes").write_text("mine")
    with atomic_file(Path("target")) as partial:
        partial.write_text("ours")
    Path("target").unlink()
    with atomic_folder(Path("target")) as partial:
        (partial / "a").write_text("ours")
    remove_folder(Path("target"))
    assert not Path("target").exists()
    with atomic_folder(Path("target")):
        pass
    assert Path(name, "notes").read_text() == "mine"


def test_a_name_may_have_the_largest_length(here: Path) -> None:
    """255 bytes. Two names that begin alike have partial files of their own."""
    first, second = Path("ä" * 127 + "b"), Path("ä" * 127 + "c")
    with atomic_file(first) as one, atomic_file(second) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert (first.read_text(), second.read_text()) == ("1", "2")
    assert sorted(path.name for path in here.iterdir()) == sorted([first.name, second.name])


def test_a_target_that_is_a_link_is_replaced_where_it_leads(here: Path) -> None:
    Path("far").mkdir()
    for name in ("folder", "dangling"):
        Path(name).symlink_to(f"far/{name}")
    Path("far/folder").mkdir()
    for name in ("folder", "dangling"):
        with atomic_folder(Path(name)) as partial:
            (partial / "a").write_text("ours")
        assert Path(name).is_symlink()
        assert (here / "far" / name / "a").read_text() == "ours"
    Path("file").symlink_to("far/file")
    with atomic_file(Path("file")) as partial:
        partial.write_text("ours")
    assert Path("file").is_symlink()
    assert Path("far/file").read_text() == "ours"


def test_links_in_a_circle_are_refused(here: Path) -> None:
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")
    with pytest.raises(OSError, match="a is a link in a circle of links"):
        resolved(Path("a"))
