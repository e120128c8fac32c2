"""What the processes of test_distributed.py do: each function is run by all processes of a group."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from openpae.data.caches import cache_latents
from openpae.data.decode import BrokenImage
from openpae.data.images import PackedImages
from openpae.data.shards import Shards
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.run_folder import open_run
from openpae.engine.task import Update
from openpae.runtime import processes
from openpae.runtime.draws import Draws
from openpae.storage.model_folder import checkpoint_path, read_model
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask
from tests.by_hand import double_precision
from tests.engine.runs import MACHINE

Run = TokenizerRun | GeneratorRun
Job = tuple[Any, ...]
"""A function and its arguments."""
HEADROOM = 1000
"""How many times the growth of one ulp a comparison allows: some ten reordered sums at each of 20 steps."""


def trained(run: Run, run_dir: Path, *, exact: bool = True, by_an_ulp: bool = False) -> dict[str, Any]:
    """What this process saw and did: rows in order, gradients of the first step, weights, metrics.

    Args:
        run: the config.
        run_dir: where.
        exact: compute a float32 run in float64: rounding is then far below defects and Adam's epsilon.
        by_an_ulp: move every initial weight to its neighbour of the same or the next larger size.
    """
    exact = exact and run.loop.precision == "fp32"
    with double_precision() if exact else nullcontext():
        task = TokenizerTask(run) if isinstance(run, TokenizerRun) else GeneratorTask(run)
        if by_an_ulp:
            for weight in (w for player in task.players.values() for w in player.parameters()):
                if weight.requires_grad:
                    up = torch.rand_like(weight) < 0.5
                    weight.data.copy_(torch.where(up, torch.nextafter(weight, 2 * weight), weight))
        result = noted(task)
        open_run(run_dir, run)
        metrics = fit(task, run_dir, run.optim, run.loop, quiet=True)
    return {**result, "metrics": metrics}


def noted(task: Any) -> dict[str, Any]:
    """Rows, first gradients and reductions of each player, which fill while the task is trained."""
    rows: list[list[float]] = []
    gradients: dict[str, Tensor] = {}
    reductions = dict.fromkeys(task.players, 0)
    original = task.batches

    def noting(steps: Sequence[int]) -> Iterator[Any]:
        for batch in original(steps):
            rows.extend(batch[0].float().flatten(1).sum(1).unsqueeze(1).tolist())
            yield batch

    task.batches = noting
    for player, optimizer in task.optimizers.items():

        def note(optimizer: Any, *_: Any, player: str = player) -> None:
            if any(name.startswith(f"{player}.") for name in gradients):
                return
            for number, weight in enumerate(optimizer.param_groups[0]["params"]):
                full = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
                gradients[f"{player}.{number}"] = full.clone()

        optimizer.register_step_pre_hook(note)
    for name, player in task.players.items():
        if isinstance(player, DistributedDataParallel):

            def reduce(state, bucket, name=name):  # type: ignore[no-untyped-def]  # DDP reads annotations
                reductions[name] += bucket.is_last()
                return allreduce_hook(state, bucket)

            player.register_comm_hook(None, reduce)
    return {"rows": rows, "gradients": gradients, "reductions": reductions}


def with_loop(run: Run, **changes: Any) -> Run:
    return replace(run, loop=replace(run.loop, **changes))


def helpers() -> dict[str, Any]:
    """What the small functions of `processes` give to this one of two processes."""
    rank = processes.rank()
    ballot = processes.Ballot()
    ones = [ballot(5 * rank if step == 1 else 0) for step in range(4)]
    return {
        "share": processes.broadcast(rank + 7),
        "gather": processes.gather(rank),
        "on_rank0": processes.on_rank0(lambda: rank + 3),
        "error of the first": error_of(lambda: processes.on_rank0(lambda: 1 // rank)),
        "error of the second": error_of(lambda: fail_in(1)),
        "no error": error_of(lambda: fail_in(2)),
        "any_rank": [processes.any_rank(rank == 1), processes.any_rank(False)],
        "mean_of": processes.mean_of(torch.tensor([1.0, 2.0]) * rank).tolist(),
        "largest_of": processes.largest_of(torch.tensor([1.0, -2.0]) * rank).tolist(),
        "norm_of": processes.norm_of(torch.tensor(3.0 + rank)).item(),
        "ballot": [*ones, ballot.close()],
        "rank_slice": list(processes.rank_slice(5)),
    }


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail_in(rank: int) -> None:
    with processes.failing_together():
        if processes.rank() == rank:
            raise ValueError(f"in {rank}")


def cached(run: TokenizerRun, folder: Path, broken: bool = False) -> Any:
    """Latents of the training images, in five shards; the names of two of them where one cannot be read."""
    source = PackedImages(run.data.images)

    def encode(images: Tensor) -> Tensor:
        if broken and processes.rank() == 1:
            raise BrokenImage("second process")
        return images[:, :, ::8, ::8] - 0.5

    def write() -> Shards:
        return cache_latents(
            encode, source, folder, image_size=32, latent_shape=(3, 4, 4), tokenizer_fingerprint="0",
            batch_size=2, per_shard=2,
        )  # fmt: skip

    if broken:
        return error_of(write), sorted(path.name for path in folder.glob("*.npy"))
    return write().fingerprint()


def poisoned(run: GeneratorRun, run_dir: Path) -> dict[str, Any]:
    """Train on a loss that is nan in the second process alone, at step 3 and for the data of step 3."""
    task = GeneratorTask(run)
    updates = task.updates

    def spoilt(batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        bad = draws.step == 3 and draws.rows.start == 1
        for update in updates(batch, draws, step):
            yield replace(update, loss=update.loss * torch.nan) if bad else update

    task.updates = spoilt  # type: ignore[method-assign]
    open_run(run_dir, run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = error_of(lambda: fit(task, run_dir, run.optim, run.loop, quiet=True))
    return {"error": error, "weights": {n: p.detach().clone() for n, p in task.model.named_parameters()}}


def stopped_by_signal(run: GeneratorRun, run_dir: Path) -> str:
    """Train until the second process gets SIGTERM in step 4."""
    task = GeneratorTask(run)
    updates = task.updates

    def interrupted(batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        if step == 4 and processes.rank() == 1 and draws.rows.start == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return updates(batch, draws, step)

    task.updates = interrupted  # type: ignore[method-assign]
    open_run(run_dir, run)
    return error_of(lambda: fit(task, run_dir, run.optim, run.loop, quiet=True))


def started_unequal(run: GeneratorRun) -> str:
    return error_of(lambda: GeneratorTask(with_loop(run, seed=processes.rank())))  # type: ignore[arg-type]


def rejected(run: GeneratorRun) -> str:
    return error_of(lambda: GeneratorTask(run))


def work(rank: int, world: int, folder: Path, jobs: Mapping[str, Job]) -> None:
    """One of the processes: every job, its findings in a file of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world
    )
    for name, (function, *arguments) in jobs.items():
        torch.save(function(*arguments), folder / f"{name}-{rank}.pt")
    distributed.destroy_process_group()


def together(world: int, folder: Path, jobs: Mapping[str, Job]) -> dict[str, list[Any]]:
    """The findings of each process for each job."""
    folder.mkdir()
    multiprocessing.spawn(work, (world, folder, jobs), nprocs=world)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world)] for name in jobs}


@dataclass(frozen=True)
class Growth:
    """How far a run goes from one whose initial weights were changed by an ulp: what rounding does."""

    logs: float
    """Largest relative difference of a logged value, which is kept in float32."""
    metrics: float
    """Largest relative difference of a metric."""
    weights: float
    """Largest difference of a weight in the end."""


def growth_of(run: Run, run_dir: Path, metrics: Mapping[str, float]) -> Growth:
    """Train the run of a folder again from weights that are off by an ulp; the folder has these metrics."""
    other = run_dir.with_name(f"{run_dir.name}-ulp")
    moved = trained(run, other, by_an_ulp=True)["metrics"]
    lines = zip(losses(other), losses(run_dir), strict=True)
    logged = [(value, line[name]) for moved_line, line in lines for name, value in moved_line.items()]
    measured = [(value, metrics[name]) for name, value in moved.items()]
    folders = (checkpoint_path(folder, run.loop.steps) for folder in (other, run_dir))
    ours, theirs = (read_model(folder)[0] for folder in folders)
    result = Growth(
        *(max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs) for pairs in (logged, measured)),
        max(float((ours[name] - theirs[name]).abs().max()) for name in theirs),
    )
    # Else the comparisons would see no defect.
    assert result.weights < 1e-9, result
    assert max(result.logs, result.metrics) < 1e-6, result
    return result


def losses(run_dir: Path, after: int = 0) -> list[dict[str, float]]:
    """The log without the clock and the learning rate."""
    return [
        {key: value for key, value in line.items() if key not in (*MACHINE, "lr")}
        for line in read_log(run_dir)
        if line["step"] > after
    ]


def compare(result: list[dict[str, float]], expected: list[dict[str, float]], growth: float = 0.0) -> None:
    """Logs that agree but for the rounding of float32, in which they are kept, and for what grows from it."""
    assert len(result) == len(expected)
    for line, other in zip(result, expected, strict=True):
        assert line == pytest.approx(other, rel=4 * 2**-24 + HEADROOM * growth, abs=1e-9)
