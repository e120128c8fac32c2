"""Which registries are asked: what pip would ask, read without running pip."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from openpae.storage import registry
from openpae.storage.registry import download, settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of this machine."""
    names = ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "CERT", "DEFAULT_INDEX")
    for name in names:
        for tool in ("PIP", "UV"):
            monkeypatch.delenv(f"{tool}_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of an HTTP server on this machine."""
    folder = tmp_path / "served"
    (folder / "simple" / "a-b").mkdir(parents=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple", folder
    server.shutdown()
    server.server_close()


def test_variables_override_files_and_pip_overrides_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex_url = of-file\n[download]\nfind-links = links\n")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "of-uv")
    monkeypatch.setenv("UV_FIND_LINKS", "links-of-uv")
    assert settings()["index-url"] == "of-file"
    assert settings()["find-links"] == "links"
    monkeypatch.setenv("PIP_INDEX_URL", "of-pip")
    assert settings()["index-url"] == "of-pip"
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_INDEX_URL")
    assert settings()["index-url"] == "of-uv"


def test_the_default_is_the_registry_of_pip_itself() -> None:
    index = pytest.importorskip("pip._internal.models.index")
    assert registry._pages("A_b", {}) == [f"{index.PyPI.simple_url}/a-b/"]
    assert registry._pages("A_b", {"no-index": "1"}) == []


def test_an_archive_is_downloaded_over_http_and_verified(
    served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, folder = served
    (folder / "files").mkdir()
    (folder / "files" / "a_b-1.tar.gz").write_bytes(b"content")
    page = '<a>no link</a><a href="../../files/a_b-1.tar.gz#sha256=0">a_b-1.tar.gz</a>'
    (folder / "simple" / "a-b" / "index.html").write_text(page)
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/")
    digest = sha256(b"content").hexdigest()
    archive = download("a_b", "a_b-1.tar.gz", digest, tmp_path / "out")
    assert archive.read_bytes() == b"content"
    with pytest.raises(ValueError, match="hash"):
        download("a_b", "a_b-1.tar.gz", "0" * 64, tmp_path / "other")
    assert not (tmp_path / "other" / "a_b-1.tar.gz").exists()


def test_a_registry_that_refuses_gives_its_reason(
    served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = served
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/nowhere")
    with pytest.raises(FileNotFoundError, match="404"):
        download("a_b", "a_b-1.tar.gz", "0" * 64, tmp_path)
