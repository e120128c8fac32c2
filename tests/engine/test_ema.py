"""The moving average of the weights, and which weights a checkpoint exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openpae.engine.ema import Ema
from openpae.models.saved import load_generator, load_tokenizer
from tests.engine.runs import LOOP, STAGES, same, state_of, task_of, tiny_run, train


def test_the_average_of_constant_weights_is_constant() -> None:
    module = nn.Linear(5, 4)
    ema = Ema(module, 0.3)
    for _ in range(50):
        ema.update()
    assert all(torch.equal(ema.average[name], p) for name, p in module.named_parameters())


def test_the_average_is_its_closed_form() -> None:
    """decay^n w_0 + (1 - decay) sum_k decay^(n-k) w_k; frozen weights and buffers are not averaged."""
    module = nn.ModuleDict(
        {"a": nn.Linear(1, 1, bias=False), "frozen": nn.Linear(1, 1), "norm": nn.BatchNorm1d(1)}
    )
    module["frozen"].requires_grad_(False)
    nn.init.constant_(module["a"].weight, 1.0)
    ema, expected = Ema(module, 0.75), 1.0
    for k in range(1, 6):
        nn.init.constant_(module["a"].weight, float(k * k))
        ema.update()
        expected = 0.75 * expected + 0.25 * k * k
    assert ema.average.keys() == {"a.weight", "norm.weight", "norm.bias"}
    assert float(ema.average["a.weight"]) == pytest.approx(expected, rel=1e-6)


def test_averaged_weights_are_in_place_only_inside_the_context() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, 0.5)
    nn.init.ones_(module.weight)
    average = ema.average["weight"].clone()
    with ema.in_place():
        assert torch.equal(module.weight, average)
    with pytest.raises(ZeroDivisionError), ema.in_place():
        1 / 0  # noqa: B018
    assert (module.weight == 1).all()
    assert torch.equal(ema.average["weight"], average)


@pytest.mark.parametrize(("export", "decay"), [("ema", 0.8), ("raw", 0.8), ("ema", None)])
def test_the_exported_weights_are_the_evaluated_ones(
    tmp_path: Path, export: Any, decay: float | None
) -> None:
    """The average or the raw weights, in evaluation mode and without gradients; buffers as they are."""
    task = tiny_run(tmp_path / "run", replace(LOOP, export=export, ema_decay=decay, evaluate_every=3))
    assert [step for step, *_ in task.judged] == [3, 6]
    _, judged, training, gradients = task.judged[-1]
    assert not training
    assert not gradients
    state = state_of(tmp_path / "run")
    assert same(state["exported"], judged)
    raw = state["players"]["model"]
    averaged = export == "ema" and decay is not None
    assert same(state["exported"], raw) == (not averaged)
    if averaged:
        assert same({name: state["exported"][name] for name in state["ema"]}, state["ema"])
    assert state["exported"]["count"] == 12  # two device batches a step


@pytest.mark.parametrize("stage", STAGES)
def test_an_exported_model_is_the_evaluated_one(runs: dict[str, Any], tmp_path: Path, stage: str) -> None:
    metrics = train(runs[stage], tmp_path)
    task = task_of(runs[stage])
    loaded = (load_tokenizer if stage == "tokenizer" else load_generator)(tmp_path)
    task.model.load_state_dict(loaded.state_dict())
    task.model.eval()
    with torch.no_grad():
        assert task.evaluate(6) == pytest.approx(metrics)
    assert metrics.keys() == ({"psnr", "ssim", "lpips"} if stage == "tokenizer" else {"mse", "cosine"})
