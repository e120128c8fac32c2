"""The training loop of all three stages. A task yields losses; the loop does the rest."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from openpae.engine import checkpoints, diagnosis
from openpae.engine.checkpoints import RunState
from openpae.engine.ema import Ema
from openpae.engine.health import NonFiniteGuard, NotFinite
from openpae.engine.journal import Journal, profiled
from openpae.engine.optim import device_batches
from openpae.engine.pace import Pace
from openpae.engine.parallel import gather_full, is_sharded, lend_weights, sync_gradients
from openpae.engine.settings import LoopConfig, OptimConfig, lr_at
from openpae.engine.task import Task, Update
from openpae.runtime import processes
from openpae.runtime.device import autocast, to_device
from openpae.runtime.draws import Draws
from openpae.runtime.signals import Stopped, catch_signals
from openpae.runtime.terminal import Progress
from openpae.storage.outputs import run_lock


def fit(
    task: Task,
    run_dir: Path,
    optim: OptimConfig,
    loop: LoopConfig,
    *,
    quiet: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    operations: float | None = None,
) -> dict[str, float]:
    """Train until loop.steps, from the newest checkpoint of run_dir or from step 0.

    With loop.seconds the run ends when that time is over: it follows the same schedule in fewer steps.
    All ranks must call it; rank 0 writes.

    Args:
        task: the players, their losses and data.
        run_dir: gets checkpoints/, log.jsonl and the files of trackers.
        optim: learning rate and clipping.
        loop: all other settings.
        quiet: no progress bar.
        clock: the time in seconds; read once a step, and only with loop.seconds.
        operations: of one image in a step; with them the log has their rate.

    Returns:
        The last evaluation.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the message names step, player, term and
            the first module. On a GPU it is raised with the next log line, always before a checkpoint.
        ValueError: the checkpoint was trained on other data, or another process trains in this folder.
        Stopped: a rank received SIGINT or SIGTERM; a checkpoint of the last step is written.
    """
    fitting = _Fitting.of(task, run_dir, optim, loop, clock)
    fitting.operations = operations
    if (run_dir / "config.yaml").is_file():
        fitting.state.config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    with run_lock(run_dir, "training"), _matmul_precision(loop.precision):
        while True:
            try:
                return fitting.run(quiet)
            except NotFinite as fault:
                fitting.go_back(fault)


def seconds_per_step(task: Task, optim: OptimConfig, loop: LoopConfig, *, steps: int = 8) -> float:
    """Seconds per optimizer step with its EMA update: the median of `steps`, after two to warm up.

    It changes the task's weights.
    """
    times = []
    start = time.perf_counter()
    for state in trial_steps(task, optim, loop, range(steps + 2)):
        if state.health.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        times.append(now - start)
        start = now
    return sorted(times[2:])[steps // 2]


def trial_steps(task: Task, optim: OptimConfig, loop: LoopConfig, steps: Sequence[int]) -> Iterator[RunState]:
    """Take these steps without run folder, log and checkpoints, to measure their cost.

    Yields the state after each step and its EMA update. It changes the task's weights.
    """
    fitting = _Fitting.of(task, Path(), optim, loop)
    log = Journal(Path(), 0, loop)
    with _matmul_precision(loop.precision):
        batches = fitting.batches(steps)
        for step in steps:
            fitting.step(batches, step, step, log)
            if fitting.state.ema is not None:
                fitting.state.ema.update()
            yield fitting.state


@dataclass
class _Fitting:
    """The state and the settings of one call of `fit`."""

    state: RunState
    run_dir: Path
    optim: OptimConfig
    loop: LoopConfig
    device: torch.device
    operations: float | None = None

    @classmethod
    def of(
        cls,
        task: Task,
        run_dir: Path,
        optim: OptimConfig,
        loop: LoopConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> _Fitting:
        device = next(next(iter(task.players.values())).parameters()).device
        state = RunState(task, None, NonFiniteGuard(loop, optim, device))
        if loop.ema_decay is not None:
            state.ema = Ema(state.exported, loop.ema_decay)
        state.pace = Pace(loop.steps, loop.seconds, loop.least_steps, clock)
        return cls(state, run_dir, optim, loop, device)

    def run(self, quiet: bool) -> dict[str, float]:
        """Train from the newest checkpoint to the last step. Returns the last evaluation."""
        loop, pace = self.loop, self.state.pace
        ballot, watch = processes.Ballot(), processes.Ballot()
        resumed = checkpoints.resume(self.state, self.run_dir)
        if resumed is not None:
            processes.on_rank0(lambda: checkpoints.remove_old(self.run_dir, loop, resumed))
        elif loop.on_nonfinite == "rollback":  # a rollback needs a checkpoint
            checkpoints.save(self.state, self.run_dir, 0, loop)
        start = resumed or 0
        log, metrics = Journal(self.run_dir, start, loop, self.operations), {}
        data_steps = _skip(range(start, pace.most), self.state.skipped_data_steps)
        with (
            catch_signals() as caught,
            log,
            Progress(self.run_dir.name, "img", done=start * loop.global_batch_size, hidden=quiet) as bar,
            profiled(self.run_dir, loop) as count_step,
        ):
            if start and self._evaluates_at(start):
                evaluated = processes.broadcast(log.evaluated)  # no: a kill came after the save
                if start >= pace.plan.last or not evaluated:
                    metrics = self._evaluate(start, None if evaluated else log)
            batches = self.batches(data_steps)
            for step, data_step in zip(range(start, pace.most), data_steps, strict=True):
                if loop.seconds is not None and pace.revise(step, watch(round(1e3 * pace.seconds())) / 1e3):
                    log.write(step, pace.log())
                if step >= pace.plan.last:
                    break
                done, last = step + 1, step + 1 == pace.plan.last
                with self._explained(step, data_steps, start):
                    self.step(batches, step, data_step, log)
                    stop = ballot(caught[0] if caught else 0)
                    evaluates = self._evaluates_at(done)
                    save = last or stop > 0 or pace.crosses(loop.save_every, done)
                    if (line := save or pace.crosses(loop.log_every, done)) or evaluates:
                        self.state.health.require_finite(step, log.means())
                if self.state.ema is not None:
                    self.state.ema.update(pace.position(done) - pace.position(step))
                bar(done * loop.global_batch_size, pace.plan.last * loop.global_batch_size)
                count_step()
                if line:
                    shown = log.flush(done, self._lr(step))
                    bar.add(" ".join(f"{k} {value:.4g}" for k, value in list(shown.items())[:4]))
                with log.paused():
                    if save:  # before the evaluation: a failed one must not cost the step
                        checkpoints.save(self.state, self.run_dir, done, loop)
                    if evaluates:
                        metrics = self._evaluate(done, log)
                if stop and not last:
                    raise Stopped(stop, done)
            ballot.close()
            watch.close()
        return metrics

    def step(self, batches: Iterator[Any], step: int, data_step: int, log: Journal) -> None:
        """Take one optimizer step of every player with an update."""
        task, parts = self.state.task, len(device_batches(self.loop))
        for module in task.players.values():
            module.train()
        for optimizer in task.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self._lr(step)
        for update, due in self._updates(batches, step, data_step):
            terms = {"loss": update.loss.detach(), **update.logs}
            terms = {f"{update.player}/{name}": value for name, value in terms.items()}
            self.state.health.check_loss(step, update.player, update.loss, terms)
            for name, value in terms.items():
                log.keep(name, value)
            for name, count in update.counts.items():
                log.count(f"{update.player}/{name}", count)
            (update.loss / parts).backward()  # type: ignore[no-untyped-call]
            if due:
                self._update(task.optimizers[update.player], update.player, step, log)

    def _lr(self, step: int) -> float:
        position = self.state.pace.position(step)
        return lr_at(position, self.optim, self.loop.steps, self.loop.extended_from)

    def _updates(self, batches: Iterator[Any], step: int, data_step: int) -> Iterator[tuple[Update, bool]]:
        """The updates of each device batch of this rank, and whether the batch is the last of the step."""
        task, loop = self.state.task, self.loop
        rows = device_batches(loop)
        for own in rows:
            batch, due = next(batches), own is rows[-1]
            draws = Draws(loop.seed, data_step, own, loop.global_batch_size, self.device)
            updates = task.updates(batch, draws, int(self.state.pace.position(step)))
            with sync_gradients(task.players.values(), due):
                while True:
                    with autocast(self.device, loop.precision):
                        update = next(updates, None)
                    if update is None:
                        break
                    yield update, due

    def _update(self, optimizer: Optimizer, player: str, step: int, log: Journal) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = math.inf if self.optim.clip is None else self.optim.clip
        local_norm = torch.nn.utils.clip_grad_norm_(weights, limit)
        norm = gather_full({"norm": local_norm})["norm"]
        skip = self.state.health.check_gradient(step, player, norm)
        log.keep(f"{player}/grad_norm", norm)
        if skip is not None:
            if not optimizer.defaults.get("fused"):
                raise ValueError(f"the optimizer of {player} must be fused: others cannot skip a step")
            optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp does
            if self.state.health.may_skip:
                log.count(f"{player}/skipped_steps", skip / processes.world_size())  # equal on all ranks
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def batches(self, steps: Sequence[int]) -> Iterator[Any]:
        """This rank's device batches of these steps, on the device, prefetched by one."""
        return to_device(self.state.task.batches(steps), self.device)

    def go_back(self, fault: NotFinite) -> None:
        """Make the next `run` start at the last checkpoint and skip the data of the bad step.

        Raises:
            NotFinite: the run must stop instead.
        """
        skipped, limit = self.state.skipped_data_steps, self.loop.nonfinite_limit
        if self.loop.on_nonfinite != "rollback":
            raise fault
        if len(skipped) >= limit:
            raise NotFinite(fault.step, f"{fault.terms}, after {limit} rollbacks") from fault
        bad = _skip(range(fault.step, fault.step + 1), skipped)[0]
        self.state.skipped_data_steps = sorted([*skipped, bad])
        self.state.health.forget()
        for optimizer in self.state.task.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if processes.is_rank0():
            warnings.warn(
                f"{fault}; rolling back to the last checkpoint, skipping data step {bad}", stacklevel=3
            )

    @contextmanager
    def _explained(self, step: int, data_steps: Sequence[int], start: int) -> Iterator[None]:
        """Inside, a step that is not finite is computed again to name the first tensor that is not finite."""
        try:
            yield
        except NotFinite as fault:
            data_step = data_steps[fault.step - start]
            raise NotFinite(fault.step, fault.terms, self._diagnose(fault.step, data_step)) from None

    def _diagnose(self, step: int, data_step: int) -> str:
        task, findings = self.state.task, diagnosis.Findings()
        for optimizer in task.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        diagnosis.check_weights(task, findings)
        batches = diagnosis.check_batches(self.batches([data_step]), findings)
        with diagnosis.watched(task, findings):
            for update, _ in self._updates(batches, step, data_step):
                findings.check_all({**update.logs, "loss": update.loss}, "the term")
                update.loss.backward()  # type: ignore[no-untyped-call]
        diagnosis.check_gradients(task, findings)
        return findings.first()

    def _evaluates_at(self, done: int) -> bool:
        pace = self.state.pace
        return done >= pace.plan.last or pace.crosses(self.loop.evaluate_every, done)

    def _evaluate(self, done: int, log: Journal | None) -> dict[str, float]:
        task, ema = self.state.task, self.state.ema if self.loop.export == "ema" else None
        weights: AbstractContextManager[None] = nullcontext() if ema is None else ema.in_place()
        if is_sharded(self.state.exported):
            weights = lend_weights(task.model, self.state.exported_weights(self.loop))
        # In float32, as `pae evaluate` does: a metric must not depend on the command.
        with weights, torch.no_grad():
            task.model.eval()
            metrics = task.evaluate(done)
            if log is not None and processes.is_rank0() and (picture := task.picture()) is not None:
                log.picture(done, picture)
        if metrics and log is not None:
            log.write(done, {f"eval/{key}": value for key, value in metrics.items()})
        return metrics


def _skip(steps: range, skipped_data_steps: Sequence[int]) -> Sequence[int]:
    """The steps of the data order that these optimizer steps see: all but the skipped ones."""
    if not skipped_data_steps:
        return steps
    kept = [step for step in range(steps.stop + len(skipped_data_steps)) if step not in skipped_data_steps]
    return kept[steps.start : steps.stop]


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Inside, GPUs multiply float32 matrices in TF32 if `precision` is tf32, else in float32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
