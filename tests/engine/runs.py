"""Tiny runs shared by several tests, and helpers to compare runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openpae.data.shard_writer import ShardWriter
from openpae.data.shards import Shards
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.optim import adamw
from openpae.engine.run_folder import open_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.engine.task import Update
from openpae.objective.settings import TokenizerLoss
from openpae.runtime.draws import Draws
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask, train_tokenizer

OPTIM = OptimConfig(lr=1e-3, final_lr=1e-4, warmup_steps=2, weight_decay=0.1, clip=1.0)
LOOP = LoopConfig(
    steps=6,
    global_batch_size=4,
    device_batch_size=2,
    precision="fp32",
    device="cpu",
    ema_decay=0.8,
    log_every=3,
    save_every=2,
)
STAGES = ["tokenizer", "generator"]
L1_ONLY = TokenizerLoss(lpips=0.0, lpips_net="random", gan=0.0, ssr=0.0, mcr=0.0, scr=0.0)


class Killed(BaseException):
    """The process is killed. It is no Exception, so nothing catches it."""


class Numbers(NamedTuple):
    """A device batch of the tiny task."""

    x: Tensor
    y: Tensor


class Tiny:
    """Linear regression; a step takes a tenth of a millisecond.

    Args:
        loop: splits the data into device batches.
        spoil: (step, loss) -> loss, to put faults in.
    """

    def __init__(
        self, loop: LoopConfig = LOOP, spoil: Callable[[int, Tensor], Tensor] = lambda _, loss: loss
    ) -> None:
        torch.manual_seed(loop.seed)
        self.loop, self.spoil = loop, spoil
        self.model = nn.Linear(3, 2)
        self.model.register_buffer("count", torch.zeros(()))
        self.players: Mapping[str, nn.Module] = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, OPTIM)}
        self.inputs: Mapping[str, str] = {"numbers": "1"}
        self.evaluations: list[tuple[int, dict[str, Tensor], bool, bool]] = []

    def batches(self, steps: range) -> Iterable[Numbers]:
        part = self.loop.device_batch_size or self.loop.global_batch_size
        for step in steps:
            g = torch.Generator().manual_seed(step)
            x = torch.randn(self.loop.global_batch_size, 3, generator=g)
            for start in range(0, len(x), part):
                yield Numbers(x[start : start + part], x[start : start + part, :2].sin())

    def updates(self, batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
        self.model.count += 1  # type: ignore[operator]
        noise = 0.01 * draws.normal("noise", 2)
        loss = (self.model(batch.x) + noise - batch.y).square().mean()
        yield Update("model", self.spoil(step, loss), {"error": loss.detach(), "size": batch.x.abs().mean()})

    def evaluate(self, step: int) -> dict[str, float]:
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.evaluations.append((step, weights, self.model.training, torch.is_grad_enabled()))
        return {"bias": float(self.model.bias.sum())}

    def picture(self) -> None:
        return None

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_file(dict(weights), folder / "model.safetensors")


def tiny_run(run_dir: Path, loop: LoopConfig = LOOP, **changes: Any) -> Tiny:
    """A tiny task, trained."""
    run_dir.mkdir(exist_ok=True)
    task = Tiny(loop, **changes)
    fit(task, run_dir, OPTIM, loop, quiet=True)
    return task


def state_of_tiny(run_dir: Path, loop: LoopConfig) -> Any:
    tiny_run(run_dir, loop)
    return state_of(run_dir)


def train(run: Any, run_dir: Path) -> dict[str, float]:
    start = train_tokenizer if isinstance(run, TokenizerRun) else train_generator
    return start(run, run_dir, quiet=True)


def task_of(run: Any) -> Any:
    return TokenizerTask(run) if isinstance(run, TokenizerRun) else GeneratorTask(run)


def train_until(run: Any, run_dir: Path, step: int) -> None:
    """Train, and raise `Killed` in the losses of this step."""
    open_run(run_dir, run)
    task = task_of(run)
    updates = task.updates

    def dying(batch: Any, draws: Draws, at: int) -> Iterator[Update]:
        if at == step:
            raise Killed
        return updates(batch, draws, at)

    task.updates = dying
    with pytest.raises(Killed):
        fit(task, run_dir, run.optim, run.loop, quiet=True)


def with_loop(run: Any, **changes: Any) -> Any:
    return replace(run, loop=replace(run.loop, **changes))


def state_of(run_dir: Path) -> Any:
    """The content of the newest checkpoint: exported weights, players, optimizers, average."""
    folder = checkpoint_path(run_dir, checkpoint_steps(run_dir)[-1])
    return {
        # Copied: the file is mapped, and some tests overwrite it.
        "exported": {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()},
        **torch.load(folder / "state.pt", weights_only=True),
    }


def same(a: Any, b: Any) -> bool:
    """Bitwise equality, nested containers included."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


MACHINE = ("images_per_second", "peak_memory_gib")
"""Values of the log that depend on the machine."""


def curve(run_dir: Path) -> list[dict[str, float]]:
    """The log without its speed, which depends on the clock."""
    return [{key: value for key, value in line.items() if key not in MACHINE} for line in read_log(run_dir)]


def rewritten(source: Shards, folder: Path, tokenizer: str, labels: np.ndarray) -> None:
    """Write the latents again for another tokenizer or with other labels."""
    from openpae.data.shards import Layout

    shutil.rmtree(folder)
    layout = Layout(
        kind="latents",
        dtype="bfloat16",
        shape=source.shape,
        sources=len(source),
        per_shard=len(source),
        attributes=source.attributes | {"tokenizer": tokenizer},
    )
    writer = ShardWriter(folder, layout)
    rows = source.gather(np.arange(len(source)))
    writer.write(0, rows + 1 if tokenizer == "another" else rows, labels.tolist())
    writer.finish()
