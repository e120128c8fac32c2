"""The latents of a generator: dropped classes, held-out latents, latents that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openpae.data.shards import Shards
from openpae.runtime.draws import Draws
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun
from tests.engine.runs import rewritten, with_loop


def test_classes_are_dropped_as_often_as_the_config_says(generator_run: GeneratorRun) -> None:
    for share in (0.0, 0.3, 1.0):
        run = replace(generator_run, model=replace(generator_run.model, class_dropout=share))
        task = GeneratorTask(with_loop(run, global_batch_size=500, device_batch_size=None))
        seen: list[Tensor] = []
        task.model.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[2]))
        batch = next(iter(task.batches(range(1))))
        update = next(iter(task.updates(batch, Draws(0, 0, range(500), 500, torch.device("cpu")), 0)))
        null = seen[0] == task.model.null_label
        assert float(null.float().mean()) == pytest.approx(share, abs=0.07)
        assert torch.equal(seen[0][~null], batch.labels[~null])
        torch.testing.assert_close(update.loss.detach(), update.logs["mse"] + update.logs["cosine"])


def test_evaluation_does_not_depend_on_the_batch_size(generator_run: GeneratorRun) -> None:
    results = []
    for part in (1, 4):
        task = GeneratorTask(with_loop(generator_run, device_batch_size=part))
        task.model.eval()
        with torch.no_grad():
            results.append(task.evaluate(0))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_size": 8}, r"holds latents of shape \(8, 4, 4\), the generator is built for \(8, 8, 8\)"),
        ({"latent_dim": 4}, r"built for \(4, 4, 4\); set model.latent_dim, model.grid_size and"),
        ({"num_classes": 1}, "has labels up to 1, but model.num_classes is 1"),
    ],
)
def test_latents_that_do_not_fit_are_rejected(
    generator_run: GeneratorRun, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorTask(replace(generator_run, model=replace(generator_run.model, **changes)))


def test_held_out_latents_must_be_of_the_same_tokenizer(
    generator_run: GeneratorRun, latents: Shards, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    rewritten(latents, tmp_path / "other", "another", latents.labels)
    with pytest.raises(ValueError, match="come from different tokenizers"):
        GeneratorTask(replace(generator_run, held_out_latents=tmp_path / "other"))
