"""A search uses its weak generator and seed, and goes on with equal settings only."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openpae.eval.extractors import FeatureExtractor, load_extractor
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import frechet_distance
from openpae.eval.guidance_search import SampleEvaluator, search_guidance
from openpae.eval.reference import Reference, reference_of
from openpae.eval.settings import SearchConfig
from openpae.models.dit import LightningDiT
from openpae.models.tokenizer import PAE
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.sampling.settings import SamplerConfig
from tests.conftest import shaken

SEARCH = SearchConfig(scales=(1.0, 2.0), starts=(0.0,), samples=4)
SAMPLER = SamplerConfig(steps=2)
OTHER: dict[str, Any] = {
    "scales": (1.0, 3.0), "starts": (0.0, 0.2), "ends": (0.9, 1.0), "samples": 6, "halving": 3, "seed": 1
}  # fmt: skip
"""For each setting another value."""


@pytest.fixture
def extractor() -> FeatureExtractor:
    return load_extractor("random")


@pytest.fixture
def reference(extractor: FeatureExtractor) -> Reference:
    real = FeatureSet(extractor)
    real.update(torch.rand(12, 3, 32, 32))
    return reference_of(real, "twelve")


@pytest.fixture
def parts(tiny_pae: PAE, tiny_dit: LightningDiT, extractor: Any, reference: Any) -> dict[str, Any]:
    return {
        "tokenizer": tiny_pae, "generator": tiny_dit, "sampler": SAMPLER, "extractor": extractor,
        "reference": reference, "search": SEARCH, "num_classes": 2, "batch_size": 3,
    }  # fmt: skip


@pytest.mark.parametrize("seed", [0, 7])
def test_the_weak_generator_and_the_seed_reach_the_samples(parts: dict[str, Any], seed: int) -> None:
    weak = shaken(LightningDiT(parts["generator"].config)).eval()
    evaluator = SampleEvaluator(**parts | {"search": replace(SEARCH, seed=seed)}, weak=weak)
    config = replace(SAMPLER, guidance=3.0, guidance_start=0.0)
    distances = []
    for guide in (weak, None):
        features = FeatureSet(parts["extractor"])
        labels = balanced_labels(4, 2)
        for images in sample_images(
            parts["tokenizer"], parts["generator"], labels, config, seed=seed, batch_size=4, weak=guide
        ):
            features.update(images)
        distances.append(frechet_distance(features.pooled.gaussian(), parts["reference"].pooled))
    assert abs(distances[0] / distances[1] - 1) > 0.01
    assert evaluator((3.0, 0.0, 1.0), 4) == pytest.approx(distances[0], rel=1e-3)


@pytest.mark.parametrize("name", [part.name for part in fields(SearchConfig)])
def test_another_setting_of_the_search_is_refused(parts: dict[str, Any], tmp_path: Path, name: str) -> None:
    search_guidance(tmp_path, SampleEvaluator(**parts), facts={})
    changed = SampleEvaluator(**parts | {"search": replace(SEARCH, **{name: OTHER[name]})})
    with pytest.raises(ValueError, match=r"holds another search: another .*search \("):
        search_guidance(tmp_path, changed, facts={})


def test_another_sampler_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    search_guidance(tmp_path, SampleEvaluator(**parts), facts={})
    changed = SampleEvaluator(**parts | {"sampler": replace(SAMPLER, steps=3)})
    with pytest.raises(ValueError, match="holds another search: another sampler"):
        search_guidance(tmp_path, changed, facts={})
