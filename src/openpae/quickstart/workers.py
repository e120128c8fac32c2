"""Choose processes and threads for the quickstart, and run a function in several processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from openpae.engine.optim import adamw
from openpae.engine.parallel import distribute
from openpae.engine.settings import LoopConfig
from openpae.models.ditdh import build_generator
from openpae.models.lpips_weights import load_perceptual
from openpae.models.tokenizer import PAE
from openpae.objective.flow import interpolate, velocity_loss
from openpae.objective.terms import image_terms
from openpae.runtime import processes
from openpae.runtime.signals import Stopped
from openpae.train.settings import GeneratorRun, TokenizerRun

T = TypeVar("T")

_TIMED, _PATIENCE = 5, 3.0
"""Steps of a timing, and the seconds after which two steps are enough."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Number of processes that share a stage, and threads of each."""

    processes: int = 1
    threads: int = 1

    def __str__(self) -> str:
        def count(number: int, word: str, more: str) -> str:
            return f"{number} {word if number == 1 else more}"

        return (
            f"{count(self.processes, 'process', 'processes')} of {count(self.threads, 'thread', 'threads')}"
        )


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds per training step with these workers."""

    workers: Workers
    tokenizer: float
    generator: float


def candidates(loop: LoopConfig) -> list[Workers]:
    """Return the candidates: one thread, one process with all threads, one process per core.

    The cores are those that this process may use, at most torch's threads (OMP_NUM_THREADS).
    """
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        return [Workers(threads=threads)]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(threads, allowed, 8)
    several = max(n for n in range(1, cores + 1) if loop.global_batch_size % n == 0)
    return list(dict.fromkeys([Workers(), Workers(threads=cores), Workers(processes=several)]))


def time_workers(tokenizer: TokenizerRun, generator: GeneratorRun) -> list[Speed]:
    """Time a training step of both stages with each candidate; return the fastest tokenizer first.

    The steps use random inputs, with L1 and LPIPS and without the losses that start later.
    """
    load_perceptual(tokenizer.loss.lpips_net, tokenizer.loss.lpips_weights)  # one process downloads
    speeds = [
        Speed(workers=workers, **run_in(workers, _seconds_of_steps, tokenizer, generator))
        for workers in candidates(tokenizer.loop)
    ]
    return sorted(speeds, key=lambda speed: speed.tokenizer)


def run_in(workers: Workers, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in several processes at once; return its result in this process, which is rank 0.

    The other processes end with this one, because their connection to it breaks.

    Args:
        workers: number of processes, and threads of each.
        function: a function at the top level of a module.
        arguments: its arguments, the same in all processes; they are pickled.
    """
    if workers.processes == 1:
        with _threads(workers.threads):
            return function(*arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "WORLD_SIZE": str(workers.processes),
        "LOCAL_WORLD_SIZE": str(workers.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "quickstart",
    }
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(
            target=_follow, args=(group | _rank(rank), workers.threads, function, arguments), daemon=True
        )
        for rank in range(1, workers.processes)
    ]
    for other in others:
        other.start()
    try:
        with _environment(group | _rank(0)), _threads(workers.threads), processes.process_group("cpu"):
            return function(*arguments)
    finally:
        for other in others:
            other.join(timeout=30)
            other.kill()


def _rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _follow(
    group: dict[str, str], threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Run in each of the other processes."""
    os.environ.update(group)
    torch.set_num_threads(threads)
    try:
        with processes.process_group("cpu"):
            function(*arguments)
    except (Stopped, KeyboardInterrupt):
        pass  # rank 0 reports it


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds_of_steps(tokenizer: TokenizerRun, generator: GeneratorRun) -> dict[str, float]:
    """Return the seconds per step of both stages, by field of `Speed`."""
    return {
        "tokenizer": _median(_tokenizer_step(tokenizer)),
        "generator": _median(_generator_step(generator)),
    }


def _median(step: Callable[[], None]) -> float:
    """Return the median seconds of a few steps after a first one. Rank 0 decides how many."""
    step()
    times: list[float] = []
    while processes.broadcast(len(times) < 2 or (len(times) < _TIMED and sum(times) < _PATIENCE)):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _tokenizer_step(run: TokenizerRun) -> Callable[[], None]:
    torch.manual_seed(0)
    rows = len(processes.rank_slice(run.loop.global_batch_size))
    model = PAE(run.model)
    player = distribute(model, run.loop)
    optimizer = adamw(player, run.optim)
    lpips = load_perceptual(run.loss.lpips_net, run.loss.lpips_weights)
    images = torch.rand(rows, 3, *run.model.image_shape)
    features = torch.randn(rows, run.model.grid_shape[0] * run.model.grid_shape[1], model.spec.dim)

    def step() -> None:
        _, (decoded,) = player(images, features)
        terms = image_terms(images, {"r": decoded}, lpips, run.loss)
        _update(torch.stack([run.loss.weights[name] * term for name, term in terms.items()]).sum(), optimizer)

    return step


def _generator_step(run: GeneratorRun) -> Callable[[], None]:
    torch.manual_seed(0)
    rows = len(processes.rank_slice(run.loop.global_batch_size))
    model = build_generator(run.model)
    player = distribute(model, run.loop)
    optimizer = adamw(player, run.optim)
    data, noise = torch.randn(2, rows, *run.model.latent_shape)
    t, labels = torch.rand(rows), torch.zeros(rows, dtype=torch.long)

    def step() -> None:
        mse, cosine = velocity_loss(player(interpolate(data, noise, t), t, labels), data, noise)
        _update(mse + cosine, optimizer)

    return step


def _update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
