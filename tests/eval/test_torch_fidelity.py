"""The same numbers as torch-fidelity from the same features and weights, where it is installed: -m peer.

It asks for torchvision, which has no build for PyTorch without CUDA in the registry and then breaks the
transformers package. Its metrics do not use it: pip install --no-deps torch-fidelity is enough, and an empty
torchvision stands in here. test_inception_blocks.py and test_scores.py hold the same facts without it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from openpae.eval.extractors import load_inception
from openpae.eval.frechet import frechet_distance, gaussian_of
from openpae.eval.inception import Inception2015
from openpae.eval.scores import inception_score, kid, precision_recall

pytestmark = pytest.mark.peer
TORCHVISION = ("", ".datasets", ".models", ".transforms", ".transforms.functional")
"""Its modules that torch-fidelity imports."""


class Anything(ModuleType):
    """A module whose every public name can be imported."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", object)


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its modules."""
    if importlib.util.find_spec("torchvision") is None:
        for name in TORCHVISION:
            monkeypatch.setitem(sys.modules, f"torchvision{name}", Anything(f"torchvision{name}"))
    names = ("metric_fid", "metric_isc", "metric_kid", "metric_prc", "feature_extractor_inceptionv3")
    return SimpleNamespace(**{name: importlib.import_module(f"torch_fidelity.{name}") for name in names})


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Features of 400 samples and 500 real images, correlated and not negative."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 64, generator=generator)
    draws = [
        torch.randn(n, 16, generator=generator) @ mix + scale * torch.randn(n, 64, generator=generator)
        for n, scale in ((400, 1.0), (500, 1.3))
    ]
    return draws[0].relu(), draws[1].relu()


def settings(**changes: Any) -> dict[str, Any]:
    from torch_fidelity.defaults import DEFAULTS

    return {**DEFAULTS, "verbose": False, **changes}


def test_fid(fidelity: SimpleNamespace, pair: tuple[Tensor, Tensor]) -> None:
    ours = frechet_distance(*(gaussian_of(x) for x in pair))
    statistics = [fidelity.metric_fid.fid_features_to_statistics(x) for x in pair]
    theirs = fidelity.metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert ours == pytest.approx(float(theirs), rel=1e-4)


def test_kid(fidelity: SimpleNamespace, pair: tuple[Tensor, Tensor]) -> None:
    ours = kid(*pair, subsets=10, subset_size=200)
    theirs = fidelity.metric_kid.kid_features_to_metric(
        *pair, **settings(kid_subsets=10, kid_subset_size=200)
    )
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)


def test_inception_score(fidelity: SimpleNamespace) -> None:
    logits = 2 * torch.randn(503, 100, generator=torch.Generator().manual_seed(0))
    ours, theirs = inception_score(logits), fidelity.metric_isc.isc_features_to_metric(logits, 10, True, 2020)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-4)


def test_precision_and_recall(fidelity: SimpleNamespace, pair: tuple[Tensor, Tensor]) -> None:
    ours, theirs = precision_recall(*pair), fidelity.metric_prc.prc_features_to_metric(*pair, **settings())
    assert 0 < ours[1].value < 1
    for estimate, name in zip(ours, ("precision", "recall"), strict=True):
        assert estimate.value == pytest.approx(float(theirs[name]), rel=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (299, 299)])
def test_inception_features(fidelity: SimpleNamespace, size: tuple[int, int], tmp_path: Path) -> None:
    network = Inception2015()
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
        elif name.endswith("bn.bias"):
            value.normal_(std=0.1)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    reference = fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "inception.pth")
    )
    levels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    ours = load_inception(tmp_path / "inception.pth").features(levels.float() / 255)
    pooled, logits = reference(levels)
    torch.testing.assert_close(ours.pooled, pooled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits, logits, rtol=1e-4, atol=1e-4)
