"""The loop that trains all three stages. A task computes losses and yields them; the loop does the rest."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from openpae import config as configs
from openpae.folders import checkpoint_path, checkpoint_steps
from openpae.storage import file_hash, read_json, whole_folder, write_json
from openpae.train.journal import Journal
from openpae.train.settings import LoopConfig, OptimConfig, lr_at
from openpae.train.task import Draws, Task


class Ema:
    """Moving average of a module's trained weights: a <- decay a + (1 - decay) w.

    Args:
        module: whose weights.
        decay: per step, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.live.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)


class Stopped(Exception):
    """The run was told to stop by a signal and has saved; the same command goes on."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; the same command goes on"
        )
        self.signum = signum


def check_run(run_dir: Path, config: Any) -> bool:
    """Whether a run folder already holds this config; False where it holds none.

    Raises:
        ValueError: the folder belongs to a run with another config; the message lists the differences.
    """
    file = run_dir / "config.yaml"
    if file.is_file():
        old = configs.load(type(config), file)
        if changed := configs.differences(old, config):
            raise ValueError(
                f"{run_dir} belongs to a run with another config ({'; '.join(changed[:5])}); "
                "name another run folder, or pass its own config.yaml to go on"
            )
        return True
    return False


def open_run(run_dir: Path, config: Any) -> None:
    """Make a run folder that holds this config, or accept one that already does.

    Call it once the task stands: a path that is not there must not leave a run folder behind.

    Raises:
        ValueError: see `check_run`.
    """
    if not check_run(run_dir, config):
        run_dir.mkdir(parents=True, exist_ok=True)
        configs.save(config, run_dir / "config.yaml")


def fit(
    task: Task, run_dir: Path, optim: OptimConfig, loop: LoopConfig, *, quiet: bool = False
) -> dict[str, float]:
    """Train until loop.steps, from the newest checkpoint of run_dir or from the start.

    Args:
        task: what to train.
        run_dir: gets checkpoints/, log.jsonl and TensorBoard files.
        optim: learning rate and clipping; the schedule is set here at every step.
        loop: everything else.
        quiet: no progress bar.

    Returns:
        The last evaluation.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the message names step, player and term. On
            a GPU this is read with the log, and never after a checkpoint was written.
        ValueError: the checkpoint was trained on other data than the task now finds, or another process
            trains
            in this folder.
        Stopped: SIGINT or SIGTERM came; a checkpoint of the last step is written.
    """
    with _alone(run_dir):
        return _fit(task, run_dir, optim, loop, quiet)


def _fit(task: Task, run_dir: Path, optim: OptimConfig, loop: LoopConfig, quiet: bool) -> dict[str, float]:
    device = next(next(iter(task.players.values())).parameters()).device
    exported = next(iter(task.players.values()))
    ema = Ema(exported, loop.ema_decay) if loop.ema_decay is not None else None
    start = _resume(run_dir, task, ema)
    log = Journal(run_dir, start, loop)
    metrics: dict[str, float] = {}
    bar = tqdm(
        total=loop.steps * loop.global_batch_size,
        initial=start * loop.global_batch_size,
        unit="img",
        unit_scale=True,
        disable=quiet,
        desc=run_dir.name,
        mininterval=1.0,
        file=sys.stderr,
        dynamic_ncols=True,
    )
    with _signals() as caught, log, bar:
        batches = iter(task.batches(range(start, loop.steps)))
        for step in range(start, loop.steps):
            _train_step(task, batches, step, optim, loop, device, log)
            if ema is not None:
                ema.update()
            bar.update(loop.global_batch_size)
            done = step + 1
            last = done == loop.steps
            if done % loop.log_every == 0 or last or caught:
                shown = log.flush(done, lr_at(step, optim, loop.steps))
                bar.set_postfix_str(" ".join(f"{key} {value:.4g}" for key, value in list(shown.items())[:4]))
            judge = last or (loop.evaluate_every > 0 and done % loop.evaluate_every == 0)
            save = last or caught or done % loop.save_every == 0
            if save:
                log.flush(done, lr_at(step, optim, loop.steps))
            log_paused = time.perf_counter()
            if judge:
                log.require_finite()  # nothing is judged of weights that are not
                metrics = _evaluate(task, ema, done, loop)
                log.write(done, {f"eval/{key}": value for key, value in metrics.items()})
            if save:
                _save(run_dir, task, ema, done, loop)
            log.clock += time.perf_counter() - log_paused  # images/s are those of training
            if caught and not last:
                raise Stopped(caught[0], done)
    if start >= loop.steps and not metrics:
        metrics = _evaluate(task, ema, loop.steps, loop)
    return metrics


def seconds_per_step(task: Task, optim: OptimConfig, loop: LoopConfig, *, steps: int = 8) -> float:
    """How long an optimizer step takes here: the median of a few, after two to warm up.

    It changes the task's weights: measure with a task that is thrown away.
    """
    device = next(next(iter(task.players.values())).parameters()).device
    log = Journal(Path(), 0, loop)
    batches = iter(task.batches(range(steps + 2)))
    times = []
    for step in range(steps + 2):
        start = time.perf_counter()
        _train_step(task, batches, step, optim, loop, device, log)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[steps // 2]


def _train_step(
    task: Task,
    batches: Iterator[Any],
    step: int,
    optim: OptimConfig,
    loop: LoopConfig,
    device: torch.device,
    log: Journal,
) -> None:
    """One optimizer step of every player that the task names, over all device batches of the global batch."""
    part = loop.device_batch_size or loop.global_batch_size
    count = loop.global_batch_size // part
    for module in task.players.values():
        module.train()
    for optimizer in task.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, optim, loop.steps)
    for micro in range(count):
        batch = to_device(next(batches), device)
        rows = range(micro * part, (micro + 1) * part)
        updates = task.updates(batch, Draws(loop.seed, step, rows, loop.global_batch_size, device), step)
        while True:
            with autocast(device, loop.precision):
                update = next(updates, None)
            if update is None:
                break
            log.add(step, update)
            (update.loss / count).backward()  # type: ignore[no-untyped-call]
            if micro == count - 1:
                _step(task.optimizers[update.player], optim.clip, update.player, step, log)


def _step(optimizer: Optimizer, clip: float | None, player: str, step: int, log: Journal) -> None:
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    limit = math.inf if clip is None else clip
    norm = torch.nn.utils.clip_grad_norm_(weights, limit)
    log.check(step, norm, {f"{player}/grad_norm": norm})  # a finite loss can have a gradient that is not
    log.keep(f"{player}/grad_norm", norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The one place where mixed precision is opened."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch, without waiting for the copy."""
    moved = (x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch)
    return type(batch)(*moved)


def _evaluate(task: Task, ema: Ema | None, step: int, loop: LoopConfig) -> dict[str, float]:
    exported = next(iter(task.players.values()))
    exported.eval()
    # In float32, as the offline commands judge: a metric must not depend on where it was taken.
    with ema.in_place() if ema and loop.export == "ema" else _nothing(), torch.no_grad():
        return task.evaluate(step)


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Hold the run folder: two processes in it would mix their logs and checkpoints. A kill lets it go."""
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is training in {run_dir}; wait for it, stop it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _save(run_dir: Path, task: Task, ema: Ema | None, step: int, loop: LoopConfig) -> None:
    """Write checkpoints/step-N: a model folder, and state.pt with all that is needed to go on."""
    exported = next(iter(task.players.values()))
    state: dict[str, Any] = {
        "step": step,
        "players": {name: _trained_state(module) for name, module in task.players.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in task.optimizers.items()},
        "ema": None if ema is None else ema.average,
    }
    with whole_folder(checkpoint_path(run_dir, step)) as folder:
        weights = exported.state_dict() | (ema.average if ema and loop.export == "ema" else {})
        task.write(folder, weights)
        torch.save(state, folder / "state.pt")
        facts = {"step": step, "images_seen": step * loop.global_batch_size, "inputs": dict(task.inputs)}
        write_json(folder / "checkpoint.json", facts | {"sha256": file_hash(folder / "state.pt")})
    for old in checkpoint_steps(run_dir)[: -loop.keep_last]:
        shutil.rmtree(checkpoint_path(run_dir, old))


def _resume(run_dir: Path, task: Task, ema: Ema | None) -> int:
    """Load the newest sound checkpoint into task and ema; returns the step to go on from, 0 for a new run."""
    for leftover in (run_dir / "checkpoints").glob(".step-*"):  # of a kill while one was written
        shutil.rmtree(leftover)
    for step in reversed(checkpoint_steps(run_dir)):
        folder = checkpoint_path(run_dir, step)
        try:
            facts = read_json(folder / "checkpoint.json")
            inputs = facts["inputs"]
            if file_hash(folder / "state.pt") != facts["sha256"]:
                raise ValueError("its checksum is wrong")
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"checkpoint {folder} is damaged and was passed over: {error}", stacklevel=3)
            continue
        if inputs != task.inputs:
            changed = sorted(name for name, _ in inputs.items() ^ task.inputs.items())
            raise ValueError(
                f"{run_dir} was trained with other {', '.join(dict.fromkeys(changed))}: what its config "
                "names has changed since; bring it back or name another run folder"
            )
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        for name, module in task.players.items():
            trained = module.state_dict() | state["players"][name]
            module.load_state_dict(trained)
        for name, optimizer in task.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if ema is not None:
            for name, average in ema.average.items():
                average.copy_(state["ema"][name])
        return int(state["step"])
    return 0


def _trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters, which come from elsewhere."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Catch SIGINT and SIGTERM: the list gets the signal, the loop saves and leaves after its step."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if caught:  # the second time means now
            raise KeyboardInterrupt
        caught.append(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
