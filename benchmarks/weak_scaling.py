"""What does a second process cost? Weak scaling of the generator's step: N processes, N times the batch.

Each process takes one thread and the same number of images. Three cases are timed in turn, again and again,
so that a busy spell of the machine falls on all of them:

    one         one process alone
    apart       as many processes as asked for, each for itself: what sharing the machine costs
    together    the same under DDP: what training one model together costs on top

Efficiency is time(one) / time(together); its noise the standard error of the ratio over the rounds.

    python benchmarks/weak_scaling.py --out runs/weak-scaling.json
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import distributed, multiprocessing

from openpae.data.shard_writer import ShardWriter
from openpae.data.shards import Layout
from openpae.engine.loop import seconds_per_step
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import LightningDiTConfig
from openpae.storage.files import write_json
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun

MODEL = LightningDiTConfig(
    latent_dim=32, grid_size=8, hidden_dim=128, num_layers=4, num_heads=4, num_classes=9
)
Case = Literal["one", "apart", "together"]
CASES: tuple[Case, ...] = ("one", "apart", "together")


def main(
    out: Path,
    processes: int = 2,
    batch_size: int = 32,
    steps: int = 20,
    rounds: int = 7,
    parallel: Literal["ddp", "fsdp"] = "ddp",
) -> None:
    """Time all cases and write the result.

    Args:
        out: the JSON file.
        processes: how many; no more than cores.
        batch_size: images per process and step.
        steps: timed steps of each case and round.
        rounds: how often.
        parallel: what the processes do together.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        latents = random_latents(Path(folder) / "latents")
        times: dict[str, list[float]] = {case: [] for case in CASES}
        for number in range(rounds):
            for case in CASES:
                store = Path(folder) / f"{case}-{number}"
                world = 1 if case == "one" else processes
                arguments = (case, world, store, latents, batch_size, steps, parallel)
                multiprocessing.spawn(work, arguments, nprocs=world)  # type: ignore[no-untyped-call]
                times[case].append(
                    max(float(path.read_text()) for path in Path(folder).glob(f"{store.name}-*"))
                )
    one, apart, together = (np.array(times[case]) for case in CASES)
    result = {
        "processes": processes,
        "parallel": parallel,
        "images_per_process": batch_size,
        "seconds_per_step": times,
        "efficiency": estimate(one / together),
        "of that, sharing the machine": estimate(one / apart),
        "of that, working together": estimate(apart / together),
        "load_before": load,
        "cores": os.cpu_count(),
    }
    write_json(out, result)
    for name in ("efficiency", "of that, sharing the machine", "of that, working together"):
        value, error = result[name]  # type: ignore[misc]
        print(f"{name}: {value:.3f} +- {error:.3f}")
    if load > 0.5:
        print(f"the machine was busy (load {load:.1f}): measure again when it is quiet")


def estimate(ratios: np.ndarray) -> tuple[float, float]:
    """Median over the rounds, and its standard error."""
    return float(np.median(ratios)), float(1.253 * ratios.std(ddof=1) / np.sqrt(len(ratios)))  # of a median


def work(
    rank: int,
    case: Case,
    world: int,
    store: Path,
    latents: Path,
    batch_size: int,
    steps: int,
    parallel: Literal["ddp", "fsdp"],
) -> None:
    """One process: the median time of its steps."""
    torch.set_num_threads(1)
    if case == "together":
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    run = GeneratorRun(
        model=MODEL,
        latents=latents,
        optim=OptimConfig(lr=1e-3),
        loop=LoopConfig(
            steps=steps + 2,
            global_batch_size=batch_size * (world if case == "together" else 1),
            precision="fp32",
            device="cpu",
            parallel=parallel,
        ),
    )
    seconds = seconds_per_step(GeneratorTask(run), run.optim, run.loop, steps=steps)
    store.with_name(f"{store.name}-{rank}").write_text(str(seconds))
    if case == "together":
        distributed.destroy_process_group()


def random_latents(folder: Path) -> Path:
    """Latents that nothing is learnt from."""
    layout = Layout(
        kind="latents",
        dtype="bfloat16",
        shape=(1, *MODEL.latent_shape),
        sources=512,
        per_shard=512,
        attributes={"tokenizer": "0" * 16, "images": "0" * 16, "classes": [str(n) for n in range(9)]},
    )
    writer = ShardWriter(folder, layout)
    rows = torch.randn(512, *layout.shape, generator=torch.Generator().manual_seed(0))
    writer.write(0, rows, [n % 9 for n in range(512)])
    writer.finish()
    return folder


if __name__ == "__main__":
    tyro.cli(main)
