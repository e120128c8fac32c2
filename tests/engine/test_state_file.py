"""What a training state may hold: one wrong value after another, each with a message of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openpae.engine.state_file import read_state

State = dict[str, Any]
NAN, INFINITE = torch.tensor([0.0, torch.nan, 1.0]), torch.full((3,), torch.inf)


def sound() -> State:
    """After two steps of a player with a weight and a counter."""
    moments = {"step": torch.tensor(2.0), "exp_avg": torch.randn(3), "exp_avg_sq": torch.rand(3)}
    return {
        "step": 2,
        "players": {"net": {"weight": torch.randn(3), "seen": torch.tensor(4)}},
        "optimizers": {"net": {"state": {0: moments}, "param_groups": []}},
        "ema": {"weight": torch.randn(3)},
        "health": {"net": torch.tensor([0.5, 0.0])},
    }


def moment(name: str, value: object) -> Callable[[State], object]:
    return lambda state: state["optimizers"]["net"]["state"][0].update({name: value})


def optimizer(**values: object) -> Callable[[State], object]:
    return lambda state: state["optimizers"]["net"].update(values)


@pytest.mark.parametrize("ema", [True, False])
def test_a_sound_state_is_read(tmp_path: Path, ema: bool) -> None:
    state = sound() if ema else sound() | {"ema": None}
    torch.save(state, tmp_path / "state.pt")
    read = read_state(tmp_path / "state.pt", 2)
    assert read.keys() == state.keys()
    torch.testing.assert_close(read["players"]["net"]["weight"], state["players"]["net"]["weight"])
    assert (read["ema"] is not None) == ema


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.update(step=True), "of step True, not of step 2"),
        (lambda s: s.update(step=3), "of step 3, not of step 2"),
        (lambda s: s.update(ema=[1]), "no valid ema"),
        (lambda s: s.pop("health"), "no valid health"),
        (lambda s: s["players"]["net"].update(weight=NAN), "weights of net hold NaN or infinity .'weight'"),
        (lambda s: s["players"]["net"].update(weight=1.0), "must be tensors by name, got float for 'weight'"),
        (lambda s: s["players"].update(net=[]), "weights of net must be tensors by name"),
        (lambda s: s["players"]["net"].update({3: NAN}), "weights of net must be tensors by name"),
        (lambda s: s["ema"].update(weight=INFINITE), "ema hold NaN or infinity"),
        (lambda s: s["optimizers"].update(net=None), "optimizer of net has no states by number"),
        (optimizer(state=[]), "optimizer of net has no states by number"),
        (optimizer(state={0.0: {}}), "optimizer of net has no states by number"),
        (optimizer(state={0: {}}), "does not match the config: its names"),
        (moment("exp_avg", NAN), "holds NaN or infinity"),
        (moment("exp_avg_sq", INFINITE), "holds NaN or infinity"),
        (moment("exp_avg_sq", -torch.ones(3)), "has a mean square below 0"),
        (moment("step", torch.tensor(-1.0)), "counts -1 updates in 2 steps"),
        (moment("step", torch.tensor(3.0)), "counts 3 updates in 2 steps"),
        (moment("step", torch.tensor(torch.nan)), "counts nan updates in 2 steps"),
        (moment("step", torch.tensor(2)), "does not match the config: step"),
        (lambda s: s["health"].update(net=torch.tensor([1.0, torch.nan])), "two finite norms >= 0"),
        (lambda s: s["health"].update(net=torch.tensor([-1.0, 0.0])), "two finite norms >= 0"),
    ],
)
def test_a_value_that_no_training_has_is_refused(
    tmp_path: Path, spoil: Callable[[State], object], says: str
) -> None:
    state = sound()
    spoil(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=says):
        read_state(tmp_path / "state.pt", 2)
