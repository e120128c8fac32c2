"""The loop: accumulation, the order of updates, clipping, logs, evaluations, devices."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from openpae.engine import loop as loop_module
from openpae.engine.health import NonFiniteGuard
from openpae.engine.journal import read_log
from openpae.engine.loop import fit, seconds_per_step
from openpae.engine.settings import OptimConfig
from openpae.engine.task import Task, Update
from openpae.models.configs import DiscriminatorConfig
from openpae.objective.settings import TokenizerLoss
from openpae.runtime.draws import Draws
from openpae.storage.model_folder import checkpoint_steps
from tests.by_hand import double_precision
from tests.engine.runs import (
    LOOP,
    OPTIM,
    STAGES,
    Numbers,
    Tiny,
    curve,
    state_of,
    task_of,
    tiny_run,
    train,
    with_loop,
)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulated_batches_equal_one_batch(runs: dict[str, Any], tmp_path: Path, stage: str) -> None:
    """Noise, crops, dropped classes and losses are those of the global batch, however it is cut.

    In float64: three steps of Adam make the rounding of reordered sums some thousand times larger."""
    with double_precision():
        for part in (1, 2, 4, None):
            train(with_loop(runs[stage], device_batch_size=part, steps=3), tmp_path / str(part))
    whole, lines = state_of(tmp_path / "None"), curve(tmp_path / "None")
    for part in ("1", "2", "4"):
        found = state_of(tmp_path / part)
        for name, value in whole["players"].items():
            for key, tensor in value.items():
                torch.testing.assert_close(
                    found["players"][name][key], tensor, atol=1e-10, rtol=1e-9, msg=key
                )
        for line, expected in zip(curve(tmp_path / part), lines, strict=True):
            assert line == pytest.approx(expected, rel=1e-6)  # the log is float32


def test_two_players_move_in_the_order_of_their_updates(tmp_path: Path) -> None:
    """What follows a yield sees stepped weights; with accumulation, only in the last device batch."""
    seen: list[tuple[int, float, float]] = []

    class Two(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.judge = nn.Linear(1, 1)
            self.players = {"model": self.model, "judge": self.judge}
            self.optimizers = {
                name: torch.optim.SGD(module.parameters(), lr=0.0) for name, module in self.players.items()
            }

        def updates(self, batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
            before = self.model.bias.detach().clone()
            yield Update("model", self.model.bias.sum(), {})
            moved = (self.model.bias - before).detach().abs().max()
            judged = self.judge.bias.detach().clone()
            if step != 1:
                yield Update("judge", -self.judge.bias.sum(), {})
            seen.append((step, float(moved), float(self.judge.bias.detach() - judged)))

    fit(Two(), tmp_path, OptimConfig(lr=0.5), replace(LOOP, steps=3, ema_decay=None), quiet=True)
    assert np.round(seen, 5).tolist() == [
        [step, moved, judged]
        for step, second in ((0, 0.5), (1, 0.0), (2, 0.5))
        for moved, judged in ((0.0, 0.0), (0.5, second))
    ]


def test_gradients_are_clipped_by_their_norm(tmp_path: Path) -> None:
    """At rate 1 a step of plain descent is as long as the clipped gradient; the log has the norm."""
    for clip, expected in ((0.25, 0.25), (None, 2.0)):
        task = Tiny()
        task.optimizers = {"model": torch.optim.SGD(task.model.parameters(), lr=0.0)}
        task.updates = lambda *_, task=task: iter(  # type: ignore[method-assign]
            [Update("model", math.sqrt(2) * task.model.bias.sum(), {})]
        )
        before = task.model.bias.detach().clone()
        optim, loop = OptimConfig(lr=1.0, clip=clip), replace(LOOP, steps=1, ema_decay=None)
        run_dir = tmp_path / str(clip)
        run_dir.mkdir()
        fit(task, run_dir, optim, loop, quiet=True)
        assert (task.model.bias - before).detach().norm() == pytest.approx(expected, rel=1e-4)
        assert read_log(run_dir)[0]["model/grad_norm"] == pytest.approx(2.0)


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_the_device(
    runs: dict[str, Any], tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two lines of the log nothing is read from a tensor, as far as a GPU may run ahead."""
    loss = TokenizerLoss(
        lpips_net="random",
        discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
        discriminator_start=0.0,
        gan_start=0.0,
        gan_weight="adaptive",
        ssr=0.0,
        scr=0.0,
        diffusion=0.1,
        kl=1e-6,
        gradients_every=2,
    )
    run = with_loop(runs[stage], steps=5, log_every=5, save_every=5)
    run = replace(run, optim=replace(OPTIM, spike_factor=5.0))
    task = task_of(replace(run, loss=loss) if stage == "tokenizer" else run)
    reads, seen = Reads(), []

    def late(*arguments: Any) -> NonFiniteGuard:
        health = NonFiniteGuard(*arguments)
        health.at_once = False  # as on a GPU
        return health

    monkeypatch.setattr(loop_module, "NonFiniteGuard", late)
    updates = task.updates

    def counting(batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        seen.append((step, reads.count))
        return updates(batch, draws, step)

    task.updates = counting
    with reads:
        fit(task, tmp_path, run.optim, run.loop, quiet=True)
    counts = dict(seen)
    assert counts[4] - counts[0] == 0
    assert reads.count > counts[4]  # the line, the checkpoint and the evaluation do


class Reads(TorchDispatchMode):
    """Counts how often Python asks a tensor for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_failed_evaluation_costs_no_step(tmp_path: Path) -> None:
    """The checkpoint is written before it, and the same command judges it again."""
    task = Tiny()

    def failing(step: int) -> dict[str, float]:
        raise RuntimeError("no memory")

    task.evaluate = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no memory"):
        fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert checkpoint_steps(tmp_path) == [4, 6]
    again = tiny_run(tmp_path)
    assert [step for step, *_ in again.judged] == [6]
    assert "eval/bias" in read_log(tmp_path)[-1]


def test_a_step_can_be_timed_before_a_run(runs: dict[str, Any]) -> None:
    for run in runs.values():
        assert 0 < seconds_per_step(task_of(run), run.optim, run.loop, steps=2) < 60


def test_tasks_are_what_the_engine_expects(runs: dict[str, Any]) -> None:
    """The first player is the exported one, each has its optimizer over just what is trained."""
    for run in runs.values():
        task: Task = task_of(run)
        assert task.players.keys() == task.optimizers.keys()
        for name, module in task.players.items():
            trained = {id(p) for p in module.parameters() if p.requires_grad}
            groups = task.optimizers[name].param_groups
            assert {id(p) for group in groups for p in group["params"]} == trained


def test_steps_are_profiled_into_the_run_folder(tmp_path: Path) -> None:
    tiny_run(tmp_path, replace(LOOP, profile_steps=2))
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert "aten::addmm" in (tmp_path / "profile" / "table.txt").read_text()
    with pytest.raises(ValueError, match=r"profile_steps must leave the first 3 of 6 steps out, got 4"):
        replace(LOOP, profile_steps=4)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_tf32_is_on_only_where_it_is_asked_for(tmp_path: Path, precision: Any, expected: bool) -> None:
    flags = []

    def noting(step: int, loss: Tensor) -> Tensor:
        flags.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return loss

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tiny_run(tmp_path, replace(LOOP, precision=precision), spoil=noting)
    assert set(flags) == {(expected, expected)}
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """A lock that a kill lets go; the second process is told, and changes nothing."""
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="another process is training"):
        fit(Tiny(), tmp_path / "run", OPTIM, LOOP, quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()
