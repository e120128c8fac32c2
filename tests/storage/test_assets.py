"""Assets: verified before they are opened, whole or absent, and errors that say what to do. No network."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openpae.runtime.extras import MissingExtra
from openpae.storage import assets
from openpae.storage.assets import ASSETS, Asset, cache_folder, fetch

MEMBERS = {"toy/data/*.svg": "svg", "toy/LICENSE": "."}
CONTENT = {"toy/data/a.svg": b"<svg/>", "toy/LICENSE": b"free", "toy/code.py": b"raise SystemExit"}


def wheel(path: Path, content: Mapping[str, bytes] = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def sdist(path: Path, content: Mapping[str, bytes] = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENPAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset "toy" whose archive lies nowhere yet; `wheel` or `put` bring it."""
    asset = Asset(
        package="toy-package",
        version="1.0",
        file="toy_package-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(wheel(tmp_path / "reference.whl").read_bytes()).hexdigest(),
        members=MEMBERS,
        megabytes=1,
        licence="MIT",
        attribution="us",
        home="toy/data",
    )
    monkeypatch.setitem(ASSETS, "toy", asset)
    return asset


def put(cache: Path, tmp_path: Path, asset: Asset) -> Path:
    """Lay the right archive where a user without a network lays it."""
    target = cache / "downloads" / asset.file
    target.parent.mkdir(parents=True)
    target.write_bytes((tmp_path / "reference.whl").read_bytes())
    return target


def test_only_the_wanted_members_are_unpacked(cache: Path, tmp_path: Path, toy: Asset) -> None:
    given = put(cache, tmp_path, toy)
    folder = fetch("toy")
    assert files(folder) == ["LICENSE", "svg/a.svg"]
    assert (folder / "svg" / "a.svg").read_bytes() == b"<svg/>"
    assert given.is_file()  # the user's file is the user's
    assert not list(cache.glob("*.partial-*"))


def test_a_finished_asset_needs_no_archive_and_no_write(cache: Path, tmp_path: Path, toy: Asset) -> None:
    given = put(cache, tmp_path, toy)
    folder = fetch("toy")
    given.unlink()
    (cache / "toy.lock").unlink(missing_ok=True)
    assert fetch("toy") == folder
    assert not (cache / "toy.lock").exists()  # so that a shared cache may be read-only


def test_wheels_and_source_archives_unpack_alike(tmp_path: Path) -> None:
    for number, archive in enumerate([wheel(tmp_path / "a.whl"), sdist(tmp_path / "a.tar.gz")]):
        assets._unpack(archive, MEMBERS, tmp_path / str(number))
        assert files(tmp_path / str(number)) == ["LICENSE", "svg/a.svg"]


def test_two_at_once_get_one_whole_asset(cache: Path, tmp_path: Path, toy: Asset) -> None:
    put(cache, tmp_path, toy)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetch, ["toy"] * 8))
    assert len(folders) == 1
    assert files(folders.pop()) == ["LICENSE", "svg/a.svg"]


def test_what_a_killed_process_leaves_is_not_taken_and_cleared(
    cache: Path, tmp_path: Path, toy: Asset
) -> None:
    put(cache, tmp_path, toy)
    half = cache / "toy.partial-killed" / "unpacked" / "svg"
    half.mkdir(parents=True)
    (half / "a.svg").write_bytes(b"<sv")
    assert (fetch("toy") / "svg" / "a.svg").read_bytes() == b"<svg/>"
    assert not list(cache.glob("*.partial-*"))


def test_a_wrong_archive_is_never_opened(cache: Path, toy: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = wheel(cache / "downloads" / toy.file, {"toy/data/a.svg": b"evil", "toy/LICENSE": b""})
    monkeypatch.setattr(assets, "_unpack", lambda *_: pytest.fail("opened before it was verified"))
    with pytest.raises(ValueError, match=r"not toy-package==1\.0: its SHA-256 is \w{64}, expected") as error:
        fetch("toy")
    assert str(wrong) in str(error.value)
    assert "delete the file" in str(error.value)
    assert not (cache / "toy-1.0").exists()


@pytest.mark.parametrize("name", ["toy/../../toy/data/a.svg", "toy/data/..\\..\\x/../a.svg"])
@pytest.mark.parametrize("make", [wheel, sdist])
def test_no_member_leaves_the_folder(tmp_path: Path, name: str, make: object) -> None:
    archive = tmp_path / ("a.whl" if make is wheel else "a.tar.gz")
    (wheel if make is wheel else sdist)(archive, {name: b"evil"})
    with pytest.raises(ValueError, match="unsafe member"):
        assets._unpack(archive, {"*.svg": "svg"}, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.svg"))


def test_links_are_not_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("toy/LICENSE")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ValueError, match=r"nothing that matches toy/LICENSE"):
        assets._unpack(tmp_path / "a.tar.gz", {"toy/LICENSE": "."}, tmp_path / "out")


@pytest.fixture
def archive_of_a_registry(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Asset, Path]:
    """An asset "tar" that is a source archive, and the folder of a registry that has it."""
    archive = sdist(tmp_path / "registry" / "toy-tar" / "toy_tar-1.0.tar.gz")
    asset = Asset(
        package="toy_tar",
        version="1.0",
        file=archive.name,
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        members=MEMBERS,
        megabytes=1,
        licence="MIT",
        attribution="us",
    )
    page = f'<a href="{archive.name}#sha256={asset.sha256}">{archive.name}</a>'
    (archive.parent / "index.html").write_text(page)
    monkeypatch.setitem(ASSETS, "tar", asset)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return asset, tmp_path / "registry"


def test_an_archive_comes_from_the_registry_of_pips_settings(
    archive_of_a_registry: tuple[Asset, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asset, folder = archive_of_a_registry
    monkeypatch.setenv("PIP_INDEX_URL", folder.as_uri())
    assert files(fetch("tar")) == ["LICENSE", "svg/a.svg"]
    assert f"downloading {asset.requirement} (1 MB" in capsys.readouterr().err


def test_a_registry_without_the_archive_says_what_to_do(
    archive_of_a_registry: tuple[Asset, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset, _ = archive_of_a_registry
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FileNotFoundError) as error:
        fetch("tar")
    for fact in ("could not be downloaded", asset.requirement, asset.file, str(cache / "downloads")):
        assert fact in str(error.value)
    assert not list(cache.glob("*.partial-*"))


def test_another_archive_of_the_registry_is_never_opened(
    archive_of_a_registry: tuple[Asset, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset, folder = archive_of_a_registry
    sdist(folder / "toy-tar" / asset.file, {"toy/data/a.svg": b"evil", "toy/LICENSE": b""})
    monkeypatch.setenv("PIP_INDEX_URL", folder.as_uri())
    monkeypatch.setattr(assets, "_unpack", lambda *_: pytest.fail("opened before it was verified"))
    with pytest.raises(ValueError, match="SHA-256"):
        fetch("tar")
    assert not (cache / "tar-1.0").exists()


def test_a_wheel_is_read_where_it_is_installed(
    cache: Path, tmp_path: Path, toy: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "toy_package-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert fetch("toy") == tmp_path / "site" / "toy" / "data"
    assert not cache.exists()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 2.0\n")
    with pytest.raises(MissingExtra, match=r"toy-package==1\.0 is needed and is installed as 2\.0; install"):
        fetch("toy")


def test_a_wheel_that_is_not_installed_names_its_extra(cache: Path, toy: Asset) -> None:
    with pytest.raises(MissingExtra, match=r"toy-package==1\.0 .* pip install 'openpae\[quickstart\]'"):
        fetch("toy")
    assert not cache.exists()


def test_unknown_asset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown asset 'lpip'; known assets: .*lpips.*openmoji"):
        fetch("lpip")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENPAE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "openpae"
    monkeypatch.setenv("OPENPAE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_every_row_is_pinned_and_credited(name: str) -> None:
    asset = ASSETS[name]
    assert len(asset.sha256) == 64
    assert asset.version in asset.file
    assert asset.licence
    assert asset.attribution
    assert asset.members
    assert (asset.home is None) == asset.file.endswith(".tar.gz")
