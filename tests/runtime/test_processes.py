"""An evaluation by two processes gives what one gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from openpae.eval.extractors import Features
from openpae.eval.features import FeatureSet
from openpae.eval.generation import Evaluation
from openpae.eval.reference import Reference, reference_of
from openpae.eval.settings import EvaluationConfig

CONFIG = EvaluationConfig(kid_subsets=4, kid_subset_size=15, splits=2, min_samples=2)
SAMPLES = 41  # no multiple of the processes or of any batch


def pictures(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, 3, 1, 1, generator=generator)
    return colours * torch.rand(count, 3, 16, 16, generator=generator)


class Thumbnails:
    """Fixed random mixtures of 8 x 8 thumbnails."""

    name, weights = "thumbnails", "seed-0"

    def features(self, images: Tensor) -> Features:
        mix = torch.randn(192, 24, generator=torch.Generator().manual_seed(0))
        x = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
        return Features(pooled=x @ mix, spatial=x[:, :10], logits=x @ mix[:, :5])


def reference() -> Reference:
    real = FeatureSet(Thumbnails())
    real.update(pictures(50, seed=1))
    return reference_of(real, "fifty")


def evaluate(rows: Tensor, batch_size: int, *, gather: bool = False) -> dict[str, float]:
    evaluation = Evaluation(Thumbnails(), reference(), CONFIG)
    for part in rows.split(batch_size):
        evaluation.update(pictures(SAMPLES, seed=2)[part], part)
    if gather:
        evaluation.gather()
    if gather and distributed.get_rank():
        return {}
    return {name: estimate.value for name, estimate in evaluation.compute()[0].items()}


def evaluate_a_share(rank: int, store: str, out: str) -> None:
    """What one of two processes does: every second sample, in batches of its own size."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = evaluate(torch.arange(rank, SAMPLES, 2), batch_size=5 + rank, gather=True)
    if rank == 0:
        torch.save(found, out)
    distributed.destroy_process_group()


def test_batches_and_processes_change_no_metric(tmp_path: Path) -> None:
    multiprocessing.spawn(evaluate_a_share, (str(tmp_path / "store"), str(tmp_path / "out.pt")), nprocs=2)
    alone = evaluate(torch.arange(SAMPLES), batch_size=SAMPLES)
    assert alone.keys() == {
        "frechet", "spatial_frechet", "inception_score", "kid", "mind", "precision", "recall",
    }  # fmt: skip
    for found in (torch.load(tmp_path / "out.pt"), evaluate(torch.arange(SAMPLES), batch_size=7)):
        for name, value in alone.items():
            assert found[name] == pytest.approx(value, rel=1e-4), name
