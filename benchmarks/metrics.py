"""How fast the Frechet distance is computed, beside torch-fidelity where that is installed.

python benchmarks/metrics.py
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from openpae.bench.record import Measured, record
from openpae.eval.frechet import Moments, frechet_distance
from openpae.runtime.device import peak_gib


def bench_metrics(*, samples: int = 50_000, features: int = 2048, block: int = 250) -> Measured:
    """Time and memory of the Frechet distance between two sets of features that are at hand.

    Args:
        samples: N of each set; features are made block by block and not timed.
        features: F.
        block: rows per block, as they would come from an extractor.

    Returns:
        statistics_seconds (of both sets), distance_seconds, peak_gib (of the process, with torch in it); and
        beside them torch_fidelity_seconds, torch_fidelity_peak_gib and relative_difference, None where
        torch-fidelity is not installed.
    """
    cpu, gaussians, statistics = torch.device("cpu"), [], 0.0
    for seed in (0, 1):
        moments = Moments()
        for rows in _random_features(seed, samples, features, block):
            start = time.perf_counter()
            moments.update(rows)
            statistics += time.perf_counter() - start
        start = time.perf_counter()
        gaussians.append(moments.gaussian())
        statistics += time.perf_counter() - start
    start = time.perf_counter()
    distance = frechet_distance(*gaussians)
    result: dict[str, float | None] = {
        "statistics_seconds": statistics,
        "distance_seconds": time.perf_counter() - start,
        "peak_gib": peak_gib(cpu),
        "torch_fidelity_seconds": None,
        "torch_fidelity_peak_gib": None,
        "relative_difference": None,
    }
    if importlib.util.find_spec("torch_fidelity") is not None:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        theirs, seconds = [], 0.0
        for seed in (0, 1):
            x = torch.cat(list(_random_features(seed, samples, features, block)))
            start = time.perf_counter()
            theirs.append(fid_features_to_statistics(x))
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        value = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
        result["torch_fidelity_seconds"] = seconds + time.perf_counter() - start
        result["torch_fidelity_peak_gib"] = peak_gib(cpu)
        result["relative_difference"] = abs(distance - float(value)) / float(value)
    return Measured(figures=result, settings={"samples": samples, "features": features, "block": block})


def _random_features(seed: int, samples: int, features: int, block: int) -> Iterator[Tensor]:
    """Rows as an extractor might give them: not negative, with the mean of the sets apart."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, samples, block):
        rows = torch.randn(min(block, samples - start), features, generator=generator)
        yield rows.abs_() + 0.01 * seed


if __name__ == "__main__":
    print(json.dumps(record("metrics", bench_metrics()), indent=1))
