"""A loss or a gradient that is not finite stops the run before its step is saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openpae.engine.loop import fit
from openpae.engine.run_folder import open_run
from openpae.engine.task import Update
from openpae.runtime.draws import Draws
from openpae.storage.model_folder import checkpoint_steps
from tests.engine.runs import LOOP, OPTIM, Numbers, Tiny, task_of


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_loss_stops_before_its_step(tmp_path: Path, bad: float) -> None:
    task = Tiny(spoil=lambda step, loss: loss * bad if step == 3 else loss)
    steps: list[dict[str, Tensor]] = []
    task.optimizers["model"].register_step_post_hook(
        lambda *_: steps.append({k: v.clone() for k, v in task.model.state_dict().items() if k != "count"})
    )
    with pytest.raises(FloatingPointError, match=r"not finite at step 3: model/loss = (nan|-?inf);"):
        fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert len(steps) == 3
    assert all(torch.equal(task.model.state_dict()[name], value) for name, value in steps[-1].items())
    assert checkpoint_steps(tmp_path) == [2]


def test_the_broken_term_is_named_and_the_finite_ones_are_not(tmp_path: Path) -> None:
    task = Tiny()

    def updates(batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
        sound, broken = task.model(batch.x).mean(), task.model(batch.x).mean() * torch.nan
        yield Update("model", sound + broken, {"sound": sound.detach(), "broken": broken.detach()})

    task.updates = updates  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="not finite at step 0") as caught:
        fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert "model/broken = nan" in str(caught.value)
    assert "sound" not in str(caught.value)
    assert "lower optim.lr, set optim.clip, or use loop.precision fp32" in str(caught.value)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_finite_loss_with_a_nonfinite_gradient_stops_too(tmp_path: Path, clip: float | None) -> None:
    """sqrt(0) is 0, its slope is not finite: without a check the weights, and a checkpoint, would be NaN."""
    task = Tiny(spoil=lambda step, loss: loss + (loss * 0).sqrt() if step == 3 else loss)
    with pytest.raises(FloatingPointError, match=r"not finite at step 3: model/grad_norm = nan"):
        fit(task, tmp_path, replace(OPTIM, clip=clip), replace(LOOP, save_every=1), quiet=True)
    assert checkpoint_steps(tmp_path) == [2, 3]
    assert all(p.isfinite().all() for p in task.model.parameters())


@pytest.mark.parametrize(("stage", "term"), [("tokenizer", "autoencoder/l1"), ("generator", "generator/mse")])
def test_a_diverged_real_run_names_step_and_term(
    runs: dict[str, Any], tmp_path: Path, stage: str, term: str
) -> None:
    open_run(tmp_path, runs[stage])
    task = task_of(runs[stage])
    updates = task.updates

    def diverging(batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        if step == 3:
            with torch.no_grad():
                next(iter(task.optimizers.values())).param_groups[0]["params"][-1].fill_(torch.nan)
        return updates(batch, draws, step)

    task.updates = diverging
    with pytest.raises(FloatingPointError, match=rf"not finite at step 3: .*{term} = nan"):
        fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert checkpoint_steps(tmp_path) == [2]
