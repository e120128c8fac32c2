"""The search finds the best candidate, keeps its budget, can be resumed, and records what it tuned on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openpae import config as configs
from openpae.eval.extractors import FeatureExtractor, load_extractor
from openpae.eval.features import FeatureSet
from openpae.eval.guidance_search import SampleEvaluator, search_guidance, successive_halving
from openpae.eval.reference import Reference, reference_of
from openpae.eval.settings import Candidate, SearchConfig
from openpae.models.dit import LightningDiT
from openpae.models.tokenizer import PAE
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.sampling.settings import SamplerConfig

SEARCH = SearchConfig(scales=(1.0, 2.0, 6.0), starts=(0.0, 0.5), samples=4)
SAMPLER = SamplerConfig(steps=2)


def test_candidates_are_all_pairs_and_no_guidance_once() -> None:
    candidates = SearchConfig(scales=(1.0, 2.0), starts=(0.0, 0.4), ends=(0.3, 1.0)).candidates(SAMPLER)
    assert candidates == [(1.0, 0.0, 1.0), (2.0, 0.0, 0.3), (2.0, 0.0, 1.0), (2.0, 0.4, 1.0)]


@pytest.mark.parametrize("halving", [2, 3])
def test_the_search_returns_the_best_and_rounds_cost_the_same(halving: int) -> None:
    """On a known curve with noise that shrinks with the number of samples, as for a Frechet distance."""
    candidates: list[Candidate] = [(w, s, 1.0) for w in (1.5, 2.0, 2.5, 3.0, 4.0) for s in (0.0, 0.2, 0.4)]
    draws = np.random.default_rng(0)
    spent: Counter[int] = Counter()

    def distance(candidate: Candidate, samples: int) -> float:
        spent[samples] += 1
        scale, start, _ = candidate
        truth = (scale - 2.5) ** 2 + 4 * (start - 0.2) ** 2
        return truth + 100 / samples + draws.normal() / samples**0.5

    assert successive_halving(candidates, distance, samples=1000, halving=halving) == (2.5, 0.2, 1.0)
    assert spent[1000] == 15
    numbers = sorted(spent)
    assert numbers == [1000 * halving**round for round in range(len(numbers))]
    for samples, count in spent.items():
        assert count * samples <= 15 * 1000 * 1.4  # rounding up leaves a little more


def test_of_equal_candidates_the_first_wins_and_one_needs_no_distance() -> None:
    candidates: list[Candidate] = [(2.0, 0.0, 1.0), (3.0, 0.0, 1.0), (4.0, 0.0, 1.0)]
    assert successive_halving(candidates, lambda c, n: 1.0, samples=2, halving=2) == candidates[0]
    assert successive_halving(candidates[:1], lambda c, n: 1 / 0, samples=2, halving=2) == candidates[0]


@pytest.fixture
def extractor() -> FeatureExtractor:
    return load_extractor("random")


@pytest.fixture
def reference(extractor: FeatureExtractor) -> Reference:
    real = FeatureSet(extractor)
    real.update(torch.rand(12, 3, 32, 32))
    return reference_of(real, "twelve")


@pytest.fixture
def evaluator(tiny_pae: PAE, tiny_dit: LightningDiT, extractor: Any, reference: Reference) -> SampleEvaluator:
    return SampleEvaluator(
        tiny_pae, tiny_dit, SAMPLER,
        extractor=extractor, reference=reference, search=SEARCH, num_classes=2, batch_size=3,
    )  # fmt: skip


def test_an_evaluator_measures_the_samples_of_sample_images(
    evaluator: SampleEvaluator, tiny_pae: PAE, tiny_dit: LightningDiT, extractor: Any, reference: Reference
) -> None:
    from openpae.eval.frechet import frechet_distance

    config = replace(SAMPLER, guidance=2.0, guidance_start=0.5)
    features = FeatureSet(extractor)
    for images in sample_images(tiny_pae, tiny_dit, balanced_labels(8, 2), config, batch_size=8):
        features.update(images)
    expected = frechet_distance(features.pooled.gaussian(), reference.pooled)
    assert evaluator((2.0, 0.5, 1.0), 8) == pytest.approx(expected, rel=1e-3)
    assert evaluator.seen[(2.0, 0.5, 1.0)].n == 8


def test_a_candidate_that_goes_on_adds_to_its_samples(
    evaluator: SampleEvaluator, tiny_dit: LightningDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    tiny_dit.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    first = evaluator((1.0, 0.0, 1.0), 4)
    assert sum(rows) == 4 * 2
    assert evaluator((1.0, 0.0, 1.0), 4) == first
    grown = evaluator((1.0, 0.0, 1.0), 8)
    assert sum(rows) == 8 * 2
    fresh = SampleEvaluator(
        evaluator.tokenizer, evaluator.generator, SAMPLER,
        extractor=evaluator.evaluation.samples.extractor, reference=evaluator.evaluation.reference,
        search=SEARCH, num_classes=2, batch_size=3,
    )  # fmt: skip
    assert fresh((1.0, 0.0, 1.0), 8) == grown  # a resumed search draws in the same steps: equal to the bit


def test_bf16_is_for_sampling_not_for_features(
    evaluator: SampleEvaluator, tiny_dit: LightningDiT, extractor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {"sampling": set(), "features": set()}
    measure = extractor.features

    def watched(images: torch.Tensor) -> Any:
        seen["features"].add(torch.is_autocast_enabled("cpu"))
        return measure(images)

    monkeypatch.setattr(extractor, "features", watched)
    tiny_dit.register_forward_pre_hook(lambda *_: seen["sampling"].add(torch.is_autocast_enabled("cpu")))
    evaluator.precision = "bf16"
    evaluator((2.0, 0.0, 1.0), 8)
    assert seen == {"sampling": {True}, "features": {False}}


def test_the_record_says_what_was_tuned_on(evaluator: SampleEvaluator, tmp_path: Path) -> None:
    lines: list[str] = []
    record = search_guidance(tmp_path, evaluator, facts={"generator": "abc"}, log=lines.append)
    assert json.loads((tmp_path / "search.json").read_text()) == record
    assert "tuned on the Frechet distance" in record["note"]
    assert "biased" in record["note"]
    assert "another seed" in record["note"]
    assert record["generator"] == "abc"
    assert record["reference_sha256"] == evaluator.evaluation.reference.sha256
    counts = Counter(row["samples"] for row in record["measured"])
    finals = [row for row in record["measured"] if row["samples"] == 16]
    (unguided,) = (row for row in finals if row["guidance"] == 1)  # measured at the end, if not before
    assert counts == {4: 5, 8: 3, 16: len(finals)}
    assert len(finals) == 2 + (unguided not in finals[:2])
    assert len(lines) == 8 + len(finals)
    last = min(finals[:2], key=lambda row: row["frechet"])
    assert bool(record["verdict"]) == (last is not unguided and last["frechet"] >= unguided["frechet"])
    best = configs.load(SamplerConfig, tmp_path / "best.yaml")
    assert (best.guidance, best.guidance_start) == (last["guidance"], last["guidance_start"])
    assert (best.solver, best.steps) == ("euler", 2)
    assert best.tuned_on is not None
    assert "twelve" in best.tuned_on
    assert record["best"] == configs.to_dict(best)


def test_a_resumed_search_gives_the_same_record(evaluator: SampleEvaluator, tmp_path: Path) -> None:
    complete = search_guidance(tmp_path / "complete", evaluator, facts={})
    evaluator.seen.clear()
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_guidance(tmp_path / "part", evaluator, facts={}, log=stop)
    assert json.loads((tmp_path / "part" / "search.json").read_text())["best"] is None
    assert not (tmp_path / "part" / "best.yaml").exists()
    evaluator.seen.clear()
    again: list[str] = []
    assert search_guidance(tmp_path / "part", evaluator, facts={}, log=again.append) == complete
    assert len(again) == len(complete["measured"]) - 6
    with pytest.raises(ValueError, match=r"holds another search: another precision \(None there, bf16 now\)"):
        search_guidance(tmp_path / "part", evaluator, facts={"precision": "bf16"})


def test_samples_of_another_size_than_the_reference_are_refused(
    tiny_pae: PAE, tiny_dit: LightningDiT, extractor: Any
) -> None:
    real = FeatureSet(extractor)
    real.update(torch.rand(4, 3, 40, 40))
    evaluator = SampleEvaluator(
        tiny_pae, tiny_dit, SAMPLER,
        extractor=extractor, reference=reference_of(real, "large"), search=SEARCH, num_classes=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"size of the reference, \(40, 40\), got \(32, 32\)"):
        evaluator((2.0, 0.0, 1.0), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "samples must be >= 2, got 1"),
        ({"halving": 1}, "halving must be >= 2, got 1"),
        ({"scales": ()}, "scales must hold at least one value"),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(**changes)


def test_a_search_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 candidates, got 1"):
        SearchConfig(scales=(1.0,)).candidates(SAMPLER)
    with pytest.raises(ValueError, match=r"guidance_start must lie in \[0, 1\], got -1"):
        SearchConfig(starts=(-1.0, 0.0)).candidates(SAMPLER)


@pytest.mark.parametrize(("offset", "usable"), [(-1.0, True), (0.0, False), (1.0, False)])
def test_guidance_that_is_no_better_than_none_is_not_usable(
    evaluator: SampleEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: float, usable: bool
) -> None:
    """With fixed distances: 5 without guidance, 5 + offset with it."""
    evaluator.search = replace(SEARCH, scales=(2.0, 3.0))  # without the candidate of no guidance
    monkeypatch.setattr(
        SampleEvaluator, "__call__", lambda _, candidate, count: 5.0 + offset * (candidate[0] != 1)
    )
    record = search_guidance(tmp_path, evaluator, facts={})
    assert (record["verdict"] == "") == usable
    if not usable:
        assert record["verdict"].startswith("not usable: no guidance is at 5.0000")
