"""A package of an extra that is missing is one line that names the extra."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import openpae
from openpae.cli import main
from openpae.runtime.extras import MissingExtra, needs, require


def _verdict() -> object:
    from openpae.study.verdicts import needed_seeds

    return needed_seeds(1.0, 1.0)


def _correlation() -> object:
    from openpae.study.correlations import _rank_correlations

    return _rank_correlations(np.zeros((3, 2)))


def _rk45() -> object:
    from openpae.sampling.solvers import runge_kutta

    return runge_kutta(lambda x, t: x, torch.ones(1, 1, 1, 1), start=0.0, stop=1.0, tolerance=1e-3)


def _clusters() -> object:
    from openpae.geometry.clusters import spectral_clusters

    return spectral_clusters(torch.rand(4, 4, 4), 2)


def _frechet() -> object:
    from openpae.eval.frechet import gaussian_of

    return gaussian_of(torch.rand(8, 4).double())


def _quickstart() -> object:
    from openpae.quickstart.run import run_quickstart

    return run_quickstart(Path("nowhere"), 720.0)


def _chart() -> object:
    from openpae.report import _line_chart

    return _line_chart("a", {"b": [(0.0, 1.0)]}, "c")


def _extractor(name: str) -> Callable[[], object]:
    def load() -> object:
        from openpae.eval.extractors import load_extractor

        return load_extractor(name, None)

    return load


def _diffusers() -> object:
    sys.modules.pop("openpae.interop.diffusers_adapter", None)
    import openpae.interop.diffusers_adapter as adapter

    return adapter


def _space() -> object:
    from openpae.interop.diffusers_models import load_diffusers

    return load_diffusers("owner/name")


def _onnx() -> object:
    from openpae.interop.export import export_model

    return export_model(torch.nn.Identity(), Path("nowhere"), "onnx")  # type: ignore[arg-type]


def _download() -> object:
    from openpae.storage.registry import download

    return download("a", "a.tar.gz", "", Path("nowhere"))


CASES: list[tuple[str, str, Callable[[], object]]] = [
    ("hub", "huggingface_hub", lambda: openpae.Pipeline.from_pretrained("owner/name")),
    ("vfm", "transformers", lambda: openpae.load_encoder("dinov2-l")),
    ("vfm", "transformers", _extractor("dinov2")),
    ("eval", "scipy", _verdict),
    ("eval", "scipy", _correlation),
    ("eval", "scipy", _rk45),
    ("eval", "scipy", _frechet),
    ("eval", "sklearn", _clusters),
    ("eval", "pooch", _download),
    ("report", "matplotlib", _chart),
    ("quickstart", "resvg_py", _quickstart),
    ("quickstart", "efficientnet_lite_pytorch", lambda: openpae.load_encoder("efficientnet-lite0")),
    ("quickstart", "efficientnet_lite_pytorch", _extractor("efficientnet-lite0")),
    ("diffusers", "diffusers", _diffusers),
    ("diffusers", "diffusers", _space),
    ("onnx", "onnxruntime", _onnx),
]


def block(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let imports of a package fail, as if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    ("extra", "package", "use"), CASES, ids=[f"{n}-{case[1]}" for n, case in enumerate(CASES)]
)
def test_a_missing_package_names_its_extra(
    extra: str, package: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    block(package, monkeypatch)
    with pytest.raises(MissingExtra) as error:
        use()
    message = str(error.value)
    assert re.search(rf"needs {package}; install it with pip install 'openpae\[{extra}\]'$", message)
    assert "\n" not in message


def test_the_command_prints_one_line_and_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block("resvg_py", monkeypatch)
    with pytest.raises(SystemExit) as end:
        main(["quickstart", "--out", str(tmp_path / "run")])
    assert end.value.code == 2
    error = "pae quickstart needs resvg_py; install it with pip install 'openpae[quickstart]'"
    assert capsys.readouterr().err == f"pae: error: {error}\n"
    assert not (tmp_path / "run").exists()


def test_other_missing_modules_stay_what_they_are() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"openpae\.nothing"), needs("eval", "this"):
        importlib.import_module("openpae.nothing")
    require("eval", "this", "json")


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert {extra for extra, _, _ in CASES} <= set(project["project"]["optional-dependencies"])
