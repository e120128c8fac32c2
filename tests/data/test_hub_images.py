"""Data sets of the hub. The network is replaced by a local folder; nothing is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from openpae.data.hub_images import CONVERTED, split_files
from openpae.data.images import open_images, place_of
from tests.data.form_files import CLASSES, parquet


class Hub:
    """A hub with one data set, whose files are those of a folder for each revision."""

    def __init__(self, **revisions: Path) -> None:
        self.revisions = {None if name == "main" else CONVERTED: folder for name, folder in revisions.items()}
        self.asked: list[Any] = []
        self.reachable = True

    def list_repo_files(self, name: str, *, repo_type: str, revision: str | None) -> list[str]:
        assert (name, repo_type) == ("owner/pictures", "dataset")
        if not self.reachable:
            raise RuntimeError("no route\nto host")  # the errors of its HTTP package are no OSError
        folder = self.revisions[revision]
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]

    def snapshot_download(self, name: str, *, revision: str | None, **options: Any) -> str:
        self.asked.append(options.get("allow_patterns"))
        if revision not in self.revisions:
            raise FileNotFoundError("not in the cache")
        return str(self.revisions[revision])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(main=parquet(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_split_is_downloaded_and_read(hub: Hub) -> None:
    source = open_images("hf:owner/pictures")
    assert (len(source), source.classes) == (60, CLASSES)
    assert hub.asked == [["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]]
    assert len(open_images("hf:owner/pictures#test")) == 2
    assert place_of(Path("hf:owner/pictures#test")) == Path("hf:owner/pictures#test")


def test_the_copy_of_the_hub_serves_where_the_data_set_has_no_parquet(hub: Hub, tmp_path: Path) -> None:
    converted = tmp_path / "converted" / "default" / "train"
    converted.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "hub" / "data").glob("train-*"))):
        shutil.copy(file, converted / f"{number:04d}.parquet")
    (tmp_path / "empty").mkdir()
    hub.revisions = {None: tmp_path / "empty", CONVERTED: tmp_path / "converted"}
    assert len(open_images("hf:owner/pictures")) == 60
    hub.revisions[CONVERTED] = tmp_path / "empty"
    with pytest.raises(ValueError, match="hf:owner/pictures has no parquet files on the hub"):
        open_images("hf:owner/pictures")


def test_without_a_network_the_cache_serves_or_one_line_says_what_to_do(hub: Hub) -> None:
    hub.reachable = False
    assert len(open_images("hf:owner/pictures#train")) == 60
    hub.revisions.clear()
    with pytest.raises(
        FileNotFoundError, match=r"the hub did not give hf:owner/pictures \(no route to host\); "
    ) as e:
        open_images("hf:owner/pictures#train")
    assert "hf download owner/pictures --repo-type dataset --local-dir FOLDER" in str(e.value)
    with pytest.raises(ValueError, match="hf:pictures is no data set of the hub; write hf:OWNER/NAME"):
        open_images("hf:pictures")


def test_splits_are_those_of_the_names() -> None:
    assert split_files("d", ["data/train-00000-of-00001-0123456789abcdef.parquet"], None) == [
        "data/train-00000-of-00001-0123456789abcdef.parquet"
    ]
    files = ["small/train/0000.parquet", "small/test/0000.parquet", "large/train/0000.parquet"]
    assert split_files("d", files, "test") == files[1:2]
    assert split_files("d", files, "large/train") == files[2:]
    with pytest.raises(
        ValueError, match="d has large/train, small/test, small/train; name one of them: d#SPLIT"
    ):
        split_files("d", files, None)
    with pytest.raises(ValueError, match=r"on the hub in part only \(partial-train\)"):
        split_files("d", ["default/partial-train/0000.parquet"], None)
