"""A run with a time limit passes through its schedule by the share of the work, whatever the pace does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from openpae.engine.ema import Ema
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.optim import adamw
from openpae.engine.pace import Pace
from openpae.engine.settings import LoopConfig, OptimConfig, lr_at
from openpae.engine.task import Update
from openpae.runtime.draws import Draws
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps

OPTIM = OptimConfig(lr=1e-2, final_lr=1e-4, warmup_steps=10)
LOOP = LoopConfig(
    steps=200,
    seconds=20.0,
    least_steps=8,
    global_batch_size=2,
    precision="fp32",
    device="cpu",
    ema_decay=0.98,
    log_every=20,
    save_every=40,
)


class Killed(BaseException):
    """The process is gone."""


class Numbers(NamedTuple):
    """A device batch."""

    x: Tensor


class Timed:
    """A regression whose every step takes as long as `cost` says; its clock is part of its state.

    Args:
        cost: step -> seconds.
        stop: the step in which the process dies.
    """

    def __init__(self, cost: Callable[[int], float], stop: int | None = None) -> None:
        torch.manual_seed(0)
        self.cost, self.stop = cost, stop
        self.model = nn.Linear(3, 1)
        self.model.register_buffer("time", torch.zeros((), dtype=torch.float64))
        self.players: Mapping[str, nn.Module] = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, OPTIM)}
        self.inputs: Mapping[str, str] = {}
        self.positions: list[int] = []

    def batches(self, steps: Iterable[int]) -> Iterator[Numbers]:
        for step in steps:
            yield Numbers(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))

    def updates(self, batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
        if draws.step == self.stop:
            raise Killed
        self.positions.append(step)
        self.model.time += self.cost(draws.step)  # type: ignore[operator]
        loss = (self.model(batch.x) - batch.x.sum(dim=1, keepdim=True)).square().mean()
        yield Update("model", loss, {})

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def picture(self) -> None:
        return None

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_file(dict(weights), folder / "model.safetensors")

    def clock(self) -> float:
        return float(self.model.time)  # type: ignore[arg-type]


def trained(run_dir: Path, task: Timed, loop: LoopConfig = LOOP) -> Timed:
    run_dir.mkdir(exist_ok=True)
    fit(task, run_dir, OPTIM, loop, quiet=True, clock=task.clock)
    return task


def slower_later(step: int) -> float:
    """A tenth of a second, and from step 20 on one second: the first plan has 200 steps."""
    return 0.1 if step < 20 else 1.0


@given(total=st.integers(1, 10**7), step=st.integers(0, 10**7))
def test_an_ordinary_run_has_one_position_a_step(total: int, step: int) -> None:
    pace = Pace(total, None)
    assert pace.position(min(step, total)) == min(step, total)
    assert not pace.revise(min(step, total), 1e9)
    assert pace.facts() is None


def test_an_ordinary_run_asks_no_clock_and_keeps_no_plan(tmp_path: Path) -> None:
    task = Timed(slower_later)
    trained(tmp_path, task, replace(LOOP, steps=12, seconds=None, least_steps=1, save_every=4, log_every=4))
    assert task.positions == list(range(12))
    assert checkpoint_steps(tmp_path)[-1] == 12
    assert "pace" not in json.loads((checkpoint_path(tmp_path, 12) / "checkpoint.json").read_text())
    assert not [line for line in read_log(tmp_path) if "pace/share" in line]


@pytest.mark.parametrize("seconds", [0.05, 0.25, 1.0])
def test_a_run_ends_with_its_time_and_its_schedule_too(tmp_path: Path, seconds: float) -> None:
    task = trained(tmp_path, Timed(lambda _: seconds))
    steps = len(task.positions)
    assert steps == pytest.approx(20.0 / seconds, abs=2)
    assert task.clock() <= LOOP.seconds + seconds
    assert task.positions == sorted(task.positions)
    assert task.positions[-1] == pytest.approx(LOOP.steps, abs=1 + 1.5 * LOOP.steps / steps)


def test_a_clock_that_slows_down_tenfold_after_the_plan_was_made(tmp_path: Path) -> None:
    """Two seconds at 10 steps a second promise 200 steps; the 18 that are left pay for 18 more, and they pass
    through all that is left of the schedule: learning rate, average and lines of the log follow."""
    task = trained(tmp_path, Timed(slower_later))
    assert task.clock() <= LOOP.seconds + 1
    assert 37 <= len(task.positions) <= 39
    gaps = [after - before for before, after in zip(task.positions, task.positions[1:], strict=False)]
    assert max(gaps[:19]) == 1  # as planned
    assert min(gaps[22:]) >= 9  # and then by larger steps, until the end
    assert max(gaps) <= 12
    lines = read_log(tmp_path)
    plans = [line for line in lines if "pace/share" in line]
    shares = [line["pace/share"] for line in plans]
    assert shares == sorted(shares)
    assert plans[0]["pace/last_step"] == pytest.approx(200, abs=1)
    assert plans[-1]["pace/last_step"] == len(task.positions)
    rates = [line["lr"] for line in lines if "lr" in line]
    assert len(rates) == pytest.approx(LOOP.steps / LOOP.log_every, abs=1)
    assert rates[-1] <= lr_at(LOOP.steps - max(gaps) - 1, OPTIM, LOOP.steps)


def test_where_time_does_not_pay_for_the_fewest_steps_the_run_takes_longer(tmp_path: Path) -> None:
    task = trained(tmp_path, Timed(lambda _: 10.0))
    assert LOOP.least_steps <= len(task.positions) <= LOOP.least_steps + 2
    assert task.clock() > LOOP.seconds


@pytest.mark.parametrize("stop", [12, 22, 30])
def test_a_run_that_is_killed_goes_on_to_the_same_weights(tmp_path: Path, stop: int) -> None:
    parts, loop = tmp_path / "parts", replace(LOOP, save_every=5)
    full = trained(tmp_path / "full", Timed(slower_later), loop)
    with pytest.raises(Killed):
        trained(parts, Timed(slower_later, stop), loop)
    assert checkpoint_steps(parts)
    again = trained(parts, Timed(slower_later), loop)
    assert len(again.positions) < len(full.positions)
    for name, value in full.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    last = checkpoint_steps(parts)[-1]
    assert last == checkpoint_steps(tmp_path / "full")[-1]
    states = [torch.load(checkpoint_path(tmp_path / name, last) / "state.pt") for name in ("parts", "full")]
    for name, value in states[0]["ema"].items():
        assert torch.equal(states[1]["ema"][name], value), name


def test_the_average_follows_the_number_of_steps() -> None:
    """Ten updates of ten positions weigh the weights as a hundred of one: weights older than the horizon are
    gone, however few steps there were."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, 0.9)
    nn.init.ones_(module.weight)
    for _ in range(3):
        ema.update(10.0)
    (average,) = ema.average.values()
    assert float(average) == pytest.approx(1 - 0.9**30, rel=1e-6)


def test_a_limit_is_checked_where_it_is_set() -> None:
    for changes, text in (
        ({"seconds": 0.0}, "loop.seconds"),
        ({"seconds": math.inf}, "loop.seconds"),
        ({"least_steps": 201}, "loop.least_steps"),
        ({"keep_every": 40}, "loop.keep_every"),
    ):
        with pytest.raises(ValueError, match=text):
            replace(LOOP, **changes)  # type: ignore[arg-type]
