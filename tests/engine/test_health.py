"""Values that are not finite: named, skipped or rolled back; gradient spikes are skipped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from openpae.engine import loop as loop_module
from openpae.engine.health import MEMORY, WARM_UP, NonFiniteGuard, NotFinite
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.optim import adamw
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.engine.task import Update
from openpae.runtime.draws import Draws
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1)
LOOP = LoopConfig(
    steps=8,
    global_batch_size=4,
    device_batch_size=2,
    precision="fp32",
    device="cpu",
    ema_decay=0.8,
    log_every=4,
    save_every=2,
)


class Numbers(NamedTuple):
    """A device batch."""

    x: Tensor


class Log(nn.Module):
    """The logarithm: nan where it is asked for one of a negative number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Root(nn.Module):
    """The root: 0 at 0, but with a slope that is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Tiny:
    """A regression on numbers that are a function of the data step.

    Args:
        loop: the run's.
        bad: data steps whose second device batch holds nan.
        scale: step -> factor on the loss.
    """

    def __init__(
        self, loop: LoopConfig, bad: Sequence[int] = (), scale: Mapping[int, float] | None = None
    ) -> None:
        torch.manual_seed(loop.seed)
        self.loop, self.bad, self.scale = loop, bad, scale or {}
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.players: Mapping[str, nn.Module] = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, OPTIM)}
        self.inputs: Mapping[str, str] = {"numbers": "1"}
        self.seen: list[int] = []

    def batches(self, steps: Sequence[int]) -> Iterable[Numbers]:
        for step in steps:
            self.seen.append(step)
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            if step in self.bad:
                x[3, 1] = torch.nan
            for part in x.split(self.loop.device_batch_size or 4):
                yield Numbers(part)

    def updates(self, batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
        noise = 0.1 * draws.normal("noise", 2)
        loss = (self.model(batch.x) + noise - batch.x[:, :2].sin()).square().mean()
        loss = loss * self.scale.get(step, 1.0)
        yield Update("model", loss, {"error": loss.detach(), "size": batch.x.abs().mean()})

    def evaluate(self, step: int) -> dict[str, float]:
        return {"bias": float(next(iter(self.model.parameters())).sum())}

    def picture(self) -> None:
        return None

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors")


def run(task: Tiny, run_dir: Path, optim: OptimConfig = OPTIM) -> Tiny:
    run_dir.mkdir(exist_ok=True)
    fit(task, run_dir, optim, task.loop, quiet=True)
    return task


def state(run_dir: Path) -> Any:
    return torch.load(checkpoint_path(run_dir, checkpoint_steps(run_dir)[-1]) / "state.pt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing is read before the log is."""

    def build(*arguments: Any) -> NonFiniteGuard:
        health = NonFiniteGuard(*arguments)
        health.at_once = False
        return health

    monkeypatch.setattr(loop_module, "NonFiniteGuard", build)


def by_hand(loop: LoopConfig, data_steps: Sequence[int], skipped: Sequence[int] = ()) -> Tiny:
    """The same training in eight lines: these data, without the steps left out."""
    task = Tiny(loop)
    optimizer, part = task.optimizers["model"], loop.device_batch_size or 4
    for step, data_step in enumerate(data_steps):
        if step in skipped:
            continue
        for number, batch in enumerate(task.batches([data_step])):
            rows = range(number * part, (number + 1) * part)
            draws = Draws(loop.seed, data_step, rows, 4, torch.device("cpu"))
            (next(task.updates(batch, draws, step)).loss / (4 // part)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = state(run_dir)["players"]["model"]
    return weights


# stop


def test_on_a_gpu_weights_stay_those_of_the_bad_step_until_it_is_read(tmp_path: Path, late: None) -> None:
    """Bad at step 5, read with the line of step 8: nothing after step 4 has moved a weight."""
    loop = replace(LOOP, save_every=4)
    task = Tiny(loop, bad=[5])
    with pytest.raises(NotFinite, match=r"not finite at step 5: model/loss = nan") as caught:
        run(task, tmp_path)
    assert "first seen when computed again: the batch's x, (2, 3), has nan values" in str(caught.value)
    assert task.seen == [*range(8), 5]  # and the step's data again, for the diagnosis
    expected = by_hand(loop, range(5))
    assert same(dict(task.model.state_dict()), dict(expected.model.state_dict()))
    assert checkpoint_steps(tmp_path) == [4]


def test_a_cpu_stops_at_once_and_says_the_same(tmp_path: Path) -> None:
    task = Tiny(LOOP, bad=[5])
    with pytest.raises(NotFinite, match=r"step 5: model/loss = nan, model/error = nan.*the batch's x"):
        run(task, tmp_path)
    assert task.seen == [0, 1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize(
    ("bias", "then", "message"),
    [
        (-50.0, Log(), r"the output of model\.1 \(Log\), \(2, 2\), has nan"),
        # The loss is finite: only the backward pass is not.
        (0.0, Root(), r"the gradient at the output of model\.0 \(Linear\), \(2, 2\), has infinite"),
    ],
)
def test_the_module_where_it_began_is_named(
    tmp_path: Path, bias: float, then: nn.Module, message: str
) -> None:
    task, first = Tiny(LOOP), nn.Linear(3, 2)
    nn.init.zeros_(first.weight)
    nn.init.constant_(first.bias, bias)
    task.model = nn.Sequential(first, then)
    task.players = {"model": task.model}
    task.optimizers = {"model": adamw(task.model, OPTIM)}
    with pytest.raises(NotFinite, match=r"step 0: .*first seen when computed again: " + message):
        run(task, tmp_path)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    task = Tiny(LOOP)
    with torch.no_grad():
        next(iter(task.model.parameters()))[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"again: the weight model\.0\.weight, \(4, 3\), has nan values;"):
        run(task, tmp_path)


def test_a_term_behind_sound_modules_is_named(tmp_path: Path) -> None:
    task = Tiny(LOOP)

    def updates(batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
        finite = task.model(batch.x).mean()
        broken = finite * torch.inf if step == 2 else finite
        yield Update("model", finite + broken, {"finite": finite.detach(), "broken": broken.detach()})

    task.updates = updates  # type: ignore[method-assign]
    with pytest.raises(NotFinite, match=r"again: the term broken, \(\), has infinite values"):
        run(task, tmp_path)


# skip


@pytest.mark.parametrize("stop_after", [None, 5, 6])
def test_a_step_is_skipped_as_if_it_had_not_been(tmp_path: Path, stop_after: int | None) -> None:
    """Steps 3 and 5 of eight; a run that is cut off and gone on with ends at the same bits."""
    loop = replace(LOOP, on_nonfinite="skip", save_every=1, keep_last=4)
    run(Tiny(loop, bad=[3, 5]), tmp_path)
    full = state(tmp_path)
    expected = by_hand(loop, range(8), skipped=[3, 5])
    assert same(weights_of(tmp_path), dict(expected.model.state_dict()))
    first = expected.optimizers["model"].state_dict()["state"][0]
    assert same(full["optimizers"]["model"]["state"][0], first)
    assert first["step"] == 6
    if stop_after is not None:
        for step in checkpoint_steps(tmp_path):
            if step > stop_after:
                shutil.rmtree(checkpoint_path(tmp_path, step))
        run(Tiny(loop, bad=[3, 5]), tmp_path)
        assert same(state(tmp_path), full)


def test_skipped_steps_are_counted_and_spoil_no_mean(tmp_path: Path) -> None:
    loop = replace(LOOP, on_nonfinite="skip", evaluate_every=0)
    run(Tiny(loop, bad=[1, 5, 6]), tmp_path)
    lines = [line for line in read_log(tmp_path) if "model/loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert [line["model/skipped_steps"] for line in lines] == [1, 0, 1, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_too_many_steps_skipped_in_a_row_end_the_run(tmp_path: Path) -> None:
    loop = replace(LOOP, on_nonfinite="skip", nonfinite_limit=3)
    with pytest.raises(NotFinite, match=r"3 steps in a row were skipped"):
        run(Tiny(loop, bad=[1, 3, 4, 5]), tmp_path)
    assert checkpoint_steps(tmp_path) == [2, 4]
    shutil.rmtree(tmp_path)
    run(Tiny(loop, bad=[0, 1, 3, 4, 6]), tmp_path)  # never three


def test_only_a_fused_optimizer_can_skip(tmp_path: Path) -> None:
    task = Tiny(replace(LOOP, on_nonfinite="skip"))
    task.optimizers = {"model": torch.optim.SGD(task.model.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match="the optimizer of model must be fused"):
        run(task, tmp_path)


# rollback


@pytest.mark.parametrize("gpu", [False, True])
def test_a_rollback_goes_on_past_the_bad_data(
    tmp_path: Path, gpu: bool, request: pytest.FixtureRequest
) -> None:
    """The run is that of a data order without the bad steps; log lines after the checkpoint are removed."""
    if gpu:
        request.getfixturevalue("late")
    loop = replace(LOOP, on_nonfinite="rollback", save_every=4, log_every=2)
    with pytest.warns(UserWarning, match=r"rolling back to the last checkpoint, skipping data step [56]"):
        run(Tiny(loop, bad=[5, 6]), tmp_path / "run")
    expected = by_hand(loop, [0, 1, 2, 3, 4, 7, 8, 9])
    assert same(weights_of(tmp_path / "run"), dict(expected.model.state_dict()))
    facts = json.loads((checkpoint_path(tmp_path / "run", 8) / "checkpoint.json").read_text())
    assert facts["passed_over"] == [5, 6]
    lines = [line["step"] for line in read_log(tmp_path / "run") if "model/loss" in line]
    assert lines == [2, 4, 6, 8]


def test_a_rollback_before_the_first_checkpoint_starts_again(tmp_path: Path) -> None:
    loop = replace(LOOP, on_nonfinite="rollback", save_every=8)
    with pytest.warns(UserWarning, match="skipping data step 1"):
        run(Tiny(loop, bad=[1]), tmp_path)
    expected = by_hand(loop, [0, 2, 3, 4, 5, 6, 7, 8])
    assert same(weights_of(tmp_path), dict(expected.model.state_dict()))


def test_a_run_that_went_back_resumes_exactly(tmp_path: Path) -> None:
    """Cut off after the rollback, at a checkpoint that knows of it and at one that does not."""
    loop = replace(LOOP, on_nonfinite="rollback", keep_last=4)
    with pytest.warns(UserWarning, match="skipping data step 3"):
        run(Tiny(loop, bad=[3]), tmp_path / "full")
    for last in (6, 2):
        shutil.copytree(tmp_path / "full", tmp_path / str(last))
        for step in checkpoint_steps(tmp_path / str(last)):
            if step > last:
                shutil.rmtree(checkpoint_path(tmp_path / str(last), step))
        task = Tiny(loop, bad=[3])
        if last == 2:  # the checkpoint does not know the bad step, so it occurs again
            with pytest.warns(UserWarning, match="skipping data step 3"):
                run(task, tmp_path / str(last))
        else:
            run(task, tmp_path / str(last))
            assert task.seen == [7, 8]
        assert same(state(tmp_path / str(last)), state(tmp_path / "full"))


def test_rollbacks_have_an_end(tmp_path: Path) -> None:
    loop = replace(LOOP, on_nonfinite="rollback", nonfinite_limit=2)
    with (
        pytest.warns(UserWarning, match="rolling back"),
        pytest.raises(NotFinite, match=r"not finite at step 3: .*, after 2 rollbacks"),
    ):
        run(Tiny(loop, bad=range(3, 100)), tmp_path)
    assert checkpoint_steps(tmp_path) == [0, 2]


# Spikes


def norms_of(factor: float, norms: Sequence[float]) -> list[float]:
    """What the guard says of a series of gradient norms."""
    health = NonFiniteGuard(LOOP, replace(OPTIM, spike_factor=factor), torch.device("cpu"))
    flags = [health.check_gradient(step, "model", torch.tensor(norm)) for step, norm in enumerate(norms)]
    return [float(flag) for flag in flags if flag is not None]


def test_a_norm_far_above_the_mean_is_a_spike() -> None:
    """Known after 20 steps; the mean is taken over the last 100, a spike counting no more than the limit."""
    norms = [1.0] * 30 + [50.0] + [1.0] * 5
    assert norms_of(3.0, norms) == [0.0] * 30 + [1.0] + [0.0] * 5
    assert norms_of(3.0, [1.0] * (WARM_UP - 1) + [50.0]) == [0.0] * WARM_UP
    mean = 1 + (3.0 - 1) / 31  # after the clipped spike
    assert norms_of(3.0, [*norms[:31], 3 * mean * 0.999])[-1] == 0
    assert norms_of(3.0, [*norms[:31], 3 * mean * 1.001])[-1] == 1


def test_a_level_that_rises_for_good_is_followed() -> None:
    flags = norms_of(2.0, [1.0] * 200 + [5.0] * 200)
    risen = flags[200:]
    assert risen[0] == 1
    # Each spike lifts the mean by 1 %: 1.01^n = 2.5.
    assert risen.index(0.0) == math.ceil(math.log(2.5) / math.log(1 + 1 / MEMORY))
    assert not any(risen[risen.index(0.0) :])


def test_a_spike_is_skipped_counted_and_remembered_by_a_checkpoint(tmp_path: Path) -> None:
    """Step 27's loss is 1,000 times too large. The means that detect it are part of the state."""
    loop = replace(LOOP, steps=30, device_batch_size=None, log_every=10, save_every=5, keep_last=6)
    optim = replace(OPTIM, spike_factor=5.0)
    run(Tiny(loop, scale={27: 1000.0}), tmp_path / "full", optim)
    expected = by_hand(loop, range(30), skipped=[27])
    assert same(weights_of(tmp_path / "full"), dict(expected.model.state_dict()))
    lines = [line for line in read_log(tmp_path / "full") if "model/skipped_steps" in line]
    assert sum(line["model/skipped_steps"] for line in lines) == 1
    count, mean = state(tmp_path / "full")["health"]["model"].tolist()
    assert count == 30
    assert 0 < mean < 10
    shutil.copytree(tmp_path / "full", tmp_path / "parts")
    shutil.rmtree(checkpoint_path(tmp_path / "parts", 30))
    run(Tiny(loop, scale={27: 1000.0}), tmp_path / "parts", optim)
    assert same(state(tmp_path / "parts"), state(tmp_path / "full"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (OPTIM, {"spike_factor": 1.0}, "optim.spike_factor must be > 1, got 1.0"),
        (LOOP, {"nonfinite_limit": 0}, "loop.nonfinite_limit must be >= 1, got 0"),
        (LOOP, {"keep_every": 3}, "loop.keep_every must be a multiple of save_every = 2, got 3"),
        (LOOP, {"profile_steps": -1}, "loop.profile_steps must be >= 0, got -1"),
    ],
)
def test_invalid_settings_are_named(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(kind, **changes)
