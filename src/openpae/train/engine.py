"""The loop that trains all three stages. A task computes losses and yields them; the loop does the rest."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from openpae import config as configs
from openpae.checkpoint import checkpoint_path, checkpoint_steps
from openpae.storage import file_hash, read_json, whole_file, whole_folder, write_json


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float
    """Learning rate at its highest."""
    final_lr: float | None = None
    """Learning rate at the last step, reached by half a cosine; null keeps `lr`."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float | None = None
    """Largest norm of the gradient; null clips nothing."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr must be > 0 and finite, got {self.lr}")
        if self.final_lr is not None and not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"optim.final_lr must lie in [0, lr = {self.lr}], got {self.final_lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps must be >= 0, got {self.warmup_steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must lie in [0, 1), got {self.betas}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip must be > 0 or null, got {self.clip}")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much at once, and what is kept."""

    steps: int
    """Optimizer steps."""
    global_batch_size: int
    """Images per optimizer step: the number that matters."""
    device_batch_size: int | None = None
    """Images per forward pass, to fit memory; null takes the whole batch. It does not change the result."""
    seed: int = 0
    """Of initial weights, data order, augmentation and noise."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast around the losses; weights, optimizer and EMA stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    compile: bool = False
    """Whole-module torch.compile."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights per step; null keeps none."""
    export: Literal["ema", "raw"] = "ema"
    """Which weights a checkpoint offers for use, and evaluation judges; without an average the raw ones."""
    log_every: int = 20
    """Steps between log lines; each is the mean since the last."""
    save_every: int = 1000
    """Steps between checkpoints; the last step always leaves one."""
    keep_last: int = 2
    """Checkpoints to keep."""
    evaluate_every: int = 0
    """Steps between evaluations under the weights that are exported; 0 evaluates only at the end."""
    num_workers: int = 0
    """Processes that read data; 0 reads in this one, best where the data are packed or cached."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "log_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"loop.{name} must be >= 0, got {getattr(self, name)}")
        part = self.device_batch_size
        if part is not None and (part < 1 or self.global_batch_size % part):
            raise ValueError(
                f"loop.device_batch_size must divide global_batch_size = {self.global_batch_size}, got {part}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"loop.ema_decay must lie in [0, 1) or be null, got {self.ema_decay}")


@dataclass(frozen=True)
class Update:
    """One optimizer step that a task asks for."""

    player: str
    """Whose weights the step changes: a key of the task's `players`."""
    loss: Tensor
    """Scalar, with gradient."""
    logs: Mapping[str, Tensor]
    """The loss's terms by symbol, scalars without gradient."""


class Task(Protocol):
    """What differs between training a refiner, a tokenizer and a generator. The rest is the loop's."""

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """Modules that are trained, by name; the first is the one that is exported and averaged."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizer of each player."""
        ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of what it trains on, by name: a run goes on only where they are the same."""
        ...

    def batches(self, steps: range) -> Iterable[Any]:
        """The device batches of these steps, in order; NamedTuples of tensors."""
        ...

    def updates(self, batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        """Yield the losses of one batch in order; what follows a yield sees the stepped weights."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the first player as it stands; called without gradients, under the exported weights."""
        ...

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the first player, with these weights, as a model folder into an existing empty folder."""
        ...


class Draws:
    """The random numbers of one device batch: a pure function of (seed, step, name).

    They are drawn for the global batch and cut, so neither the device batch size nor the number of
    devices changes what a sample gets, and an interrupted run needs no generator state to go on.

    Args:
        seed: of the run.
        step: the optimizer step.
        rows: rows of the global batch that this device batch holds.
        whole: size of the global batch.
        device: where the numbers are drawn.
    """

    def __init__(self, seed: int, step: int, rows: range, whole: int, device: torch.device) -> None:
        self.seed, self.step, self.rows, self.whole, self.device = seed, step, rows, whole, device

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal, (B, *shape)."""
        return self._cut(torch.randn(self.whole, *shape, generator=self._generator(name), device=self.device))

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape)."""
        return self._cut(torch.rand(self.whole, *shape, generator=self._generator(name), device=self.device))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=7).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest, "big"))

    def _cut(self, numbers: Tensor) -> Tensor:
        return numbers[self.rows.start : self.rows.stop]


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


def lr_at(step: int, optim: OptimConfig, steps: int) -> float:
    """Learning rate of a step: linear warm-up from lr / warmup_steps, then constant or half a cosine to
    final_lr."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.final_lr is None:
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(modules: nn.Module | Sequence[nn.Parameter], optim: OptimConfig) -> Optimizer:
    """AdamW over the parameters that require a gradient."""
    parameters = modules.parameters() if isinstance(modules, nn.Module) else modules
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )


def pick_device(device: str) -> torch.device:
    """The device that a config means.

    Raises:
        ValueError: cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("loop.device is cuda, but torch sees no GPU; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def open_run(run_dir: Path, config: Any) -> None:
    """Make a run folder that holds this config, or accept one that already does.

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
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        configs.save(config, file)


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
        ValueError: the checkpoint was trained on other data than the task now finds.
        Stopped: SIGINT or SIGTERM came; a checkpoint of the last step is written.
    """
    device = next(next(iter(task.players.values())).parameters()).device
    exported = next(iter(task.players.values()))
    ema = Ema(exported, loop.ema_decay) if loop.ema_decay is not None else None
    start = _resume(run_dir, task, ema)
    log = _Log(run_dir, start, loop)
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
            if last or (loop.evaluate_every and done % loop.evaluate_every == 0):
                metrics = _evaluate(task, ema, done, loop, device)
                log.write(done, {f"eval/{key}": value for key, value in metrics.items()})
            if last or caught or done % loop.save_every == 0:
                log.flush(
                    done, lr_at(step, optim, loop.steps)
                )  # a checkpoint is written only of finite steps
                _save(run_dir, task, ema, done, loop)
            if caught and not last:
                raise Stopped(caught[0], done)
    if start >= loop.steps and not metrics:
        metrics = _evaluate(task, ema, loop.steps, loop, device)
    return metrics


def seconds_per_step(task: Task, optim: OptimConfig, loop: LoopConfig, *, steps: int = 8) -> float:
    """How long an optimizer step takes here: the median of a few, after two to warm up.

    It changes the task's weights: measure with a task that is thrown away.
    """
    device = next(next(iter(task.players.values())).parameters()).device
    log = _Log(Path(), 0, loop)
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
    log: _Log,
) -> None:
    """One optimizer step of every player that the task names, over all device batches of the global batch."""
    part = loop.device_batch_size or loop.global_batch_size
    count = loop.global_batch_size // part
    for module in task.players.values():
        module.train()
    for optimizer in task.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, optim, loop.steps) * group.get("lr_factor", 1.0)
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


def _step(optimizer: Optimizer, clip: float | None, player: str, step: int, log: _Log) -> None:
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


def _evaluate(
    task: Task, ema: Ema | None, step: int, loop: LoopConfig, device: torch.device
) -> dict[str, float]:
    exported = next(iter(task.players.values()))
    exported.eval()
    with (
        ema.in_place() if ema and loop.export == "ema" else _nothing(),
        torch.no_grad(),
        autocast(device, loop.precision),
    ):
        return task.evaluate(step)


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


@dataclass
class _Log:
    """log.jsonl and TensorBoard; sums stay on the device until a line is due, so no step waits for them."""

    run_dir: Path
    start: int
    loop: LoopConfig
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    first_bad: Tensor | None = None

    def __enter__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = self.run_dir / "log.jsonl"
        if self.file.is_file():  # what was logged after the checkpoint happens again
            lines = [line for line in read_log(self.run_dir) if line["step"] <= self.start]
            with whole_file(self.file) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self.board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.start + 1)
        self.clock, self.clock_step = time.perf_counter(), self.start

    def __exit__(self, *_: object) -> None:
        self.board.close()

    def add(self, step: int, update: Update) -> None:
        """Take in an update before its step; on a CPU a loss that is not finite stops here."""
        terms = {f"{update.player}/{name}": value for name, value in update.logs.items()}
        terms = {f"{update.player}/loss": update.loss.detach(), **terms}
        self.check(step, update.loss.detach(), terms)
        for name, value in terms.items():
            self.keep(name, value)

    def check(self, step: int, value: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Stop if a value is not finite: on a CPU now, on a GPU with the next line, as nothing may wait."""
        if value.device.type == "cpu":
            if not value.isfinite():
                raise _not_finite(step, terms)
        else:
            bad = torch.where(value.isfinite(), math.inf, float(step))
            self.first_bad = bad if self.first_bad is None else torch.minimum(self.first_bad, bad)

    def keep(self, name: str, value: Tensor) -> None:
        """Add to the mean of the next line."""
        value = value.detach().float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + 1

    def flush(self, step: int, lr: float) -> dict[str, float]:
        """Write the means since the last line; one read from the device. Returns them."""
        if not self.sums:
            return {}
        values = torch.stack(list(self.sums.values())).tolist()
        means = {name: value / self.counts[name] for name, value in zip(self.sums, values, strict=True)}
        self.sums.clear()
        self.counts.clear()
        if self.first_bad is not None and math.isfinite(bad := self.first_bad.item()):
            broken = {name: torch.tensor(value) for name, value in means.items()}
            raise _not_finite(int(bad), broken)
        now = time.perf_counter()
        images = (step - self.clock_step) * self.loop.global_batch_size
        rate = {"lr": lr, "images_per_second": images / (now - self.clock)}
        self.clock, self.clock_step = now, step
        self.write(step, means | rate)
        return means

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        line = {"step": step, "images_seen": step * self.loop.global_batch_size, **values}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def read_log(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's log.jsonl; a last line cut off by a kill is left out."""
    lines = []
    for text in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _not_finite(step: int, terms: Mapping[str, Tensor]) -> FloatingPointError:
    named = [f"{name} = {value.item()}" for name, value in terms.items() if not value.isfinite()]
    return FloatingPointError(
        f"training is not finite at step {step}: {', '.join(named) or 'no single term'}; "
        "nothing was saved after it: lower optim.lr, set optim.clip, or use loop.precision fp32"
    )
