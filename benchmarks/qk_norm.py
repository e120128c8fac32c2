"""Does a long bf16 run of the generator stay healthy without QK-norm? The paper has both recipes.

Trains the quickstart's generator twice, with and without RMS-normalised queries and keys, in bf16 and
otherwise alike, and writes for both the loss, the gradient norm and the largest attention logit. An
interrupted run goes on.

    python benchmarks/qk_norm.py --latents runs/quickstart/latents --out runs/qk-norm
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional

from openpae import config as configs
from openpae.data.shards import Shards
from openpae.engine.journal import read_log
from openpae.engine.settings import OptimConfig
from openpae.models.saved import load_generator
from openpae.objective.flow import interpolate
from openpae.runtime.device import autocast
from openpae.storage.files import write_json
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps
from openpae.train.generator import train_generator
from openpae.train.settings import GeneratorRun


def main(
    latents: Path,
    out: Path,
    steps: int = 20_000,
    batch_size: int = 32,
    lr: float = 1e-3,
) -> None:
    """Run both, and write qk-norm.json and qk-norm.md.

    Args:
        latents: folder with train/ and held-out/ latents, as pae quickstart leaves it.
        out: gets a run folder each, and the results.
        steps: optimizer steps of each run.
        batch_size: images per step.
        lr: learning rate, constant after 100 steps of warm-up: high for the paper's recipe (2e-4).
    """
    torch.set_num_threads(1)
    preset = configs.load(GeneratorRun, "generator/quickstart")
    found: dict[str, list[dict[str, float]]] = {}
    for name, qk_norm in (("without", False), ("with", True)):
        run = dataclasses.replace(
            preset,
            model=dataclasses.replace(preset.model, qk_norm=qk_norm),
            latents=latents / "train",
            held_out_latents=latents / "held-out",
            optim=OptimConfig(lr=lr, warmup_steps=100),  # constant and unclipped, as in the paper
            loop=dataclasses.replace(
                preset.loop,
                steps=steps,
                global_batch_size=batch_size,
                precision="bf16",
                device="cpu",
                log_every=100,
                save_every=steps // 20,
                keep_every=steps // 20,
                evaluate_every=steps // 10,
                ema_decay=None,
            ),
        )
        train_generator(run, out / name, quiet=True)
        found[name] = table_of(out / name, latents / "held-out")
    write_json(out / "qk-norm.json", dict(found))
    (out / "qk-norm.md").write_text(as_markdown(found), encoding="utf-8")
    print(as_markdown(found))


def table_of(run_dir: Path, latents: Path) -> list[dict[str, float]]:
    """Per checkpoint: mean loss and gradient norm since the last one, the largest mean norm of a line of the
    log, the largest logit, and the held-out loss where it was measured."""
    log, rows, before = read_log(run_dir), [], 0
    for step in checkpoint_steps(run_dir):
        lines = [line for line in log if before < line["step"] <= step and "generator/loss" in line]
        judged = [line for line in log if line["step"] == step and "eval/mse" in line]
        norms = [line["generator/grad_norm"] for line in lines]
        row = {
            "step": step,
            "loss": float(np.mean([line["generator/loss"] for line in lines])),
            "gradient norm": float(np.mean(norms)),
            "largest mean norm": max(norms),
            "largest logit": largest_logit(checkpoint_path(run_dir, step), latents),
        }
        rows.append(row | ({"held-out mse": judged[-1]["eval/mse"]} if judged else {}))
        before = step
    return rows


@torch.no_grad()
def largest_logit(folder: Path, latents: Path) -> float:
    """max q k / sqrt(d) over blocks, heads and 64 held-out images at random positions t."""
    model, shards = load_generator(folder), Shards(latents, kind="latents")
    attend, largest = functional.scaled_dot_product_attention, [0.0]

    def noting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        largest.append(float((q.float() @ k.float().mT).abs().max()) / math.sqrt(q.shape[-1]))
        return attend(q, k, v)

    rows = np.arange(min(64, len(shards)))
    z = model.normalise(shards.gather(rows, np.zeros_like(rows)))
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(len(z), generator=generator)
    x = interpolate(z, torch.randn(z.shape, generator=generator), t)
    with patch.object(functional, "scaled_dot_product_attention", noting), autocast(x.device, "bf16"):
        model(x, t, torch.from_numpy(shards.labels[rows]))
    return max(largest)


def as_markdown(found: dict[str, list[dict[str, float]]]) -> str:
    """One row per second checkpoint, both runs beside each other."""
    keys = ["loss", "gradient norm", "largest mean norm", "largest logit", "held-out mse"]
    head = " | ".join(f"{key}, {name}" for key in keys for name in found)
    lines = [f"| step | {head} |", "|" + "---|" * (1 + len(keys) * len(found))]
    for rows in zip(*found.values(), strict=True):
        if "held-out mse" in rows[0]:
            cells = " | ".join(f"{row[key]:.4g}" for key in keys for row in rows)
            lines.append(f"| {rows[0]['step']:,} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
