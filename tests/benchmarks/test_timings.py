"""Every benchmark runs at tiny size and gives the figures that it promises."""

from __future__ import annotations

import pytest

from benchmarks import caches, metrics, refiner


def test_caches_and_loader_are_timed() -> None:
    found = caches.bench_cache(preset="tokenizer/tiny", images=6, batch_size=4)
    assert found.figures.keys() == {"latents_images_per_second", "features_images_per_second"}
    assert all(value > 0 for value in found.figures.values())
    found = caches.bench_loader(rows=64, shape=(4, 2, 2), batch_size=32, seconds=0.05)
    rate = found.figures["latents_per_second"]
    assert found.figures["gigabytes_per_second"] == pytest.approx(rate * 4 * 2 * 2 * 2 / 1e9)


def test_the_frechet_distance_is_timed() -> None:
    found = metrics.bench_metrics(samples=60, features=8, block=25)
    assert found.figures["statistics_seconds"] > 0
    assert found.figures["distance_seconds"] > 0
    assert 0 < found.figures["peak_gib"] < 64


def test_the_refiners_step_is_timed() -> None:
    found = refiner.bench_refiner(preset="refiner/tiny", steps=1)
    assert found.figures.keys() == {"step_seconds", "images_per_second", "reference_seconds"}
    assert all(value > 0 for value in found.figures.values())
