"""What each loss adds to a tokenizer step: CPU time of steps of the same code, as ratios to L1 + LPIPS.

The networks have random weights, but for LPIPS. The discriminator looks through a ViT-S/16 of DINO's sizes.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py
"""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from transformers import ViTConfig, ViTModel

from openpae import config as configs
from openpae.bench.noise import random_images
from openpae.engine.loop import trial_steps
from openpae.models.configs import RefinerConfig
from openpae.models.encoders import encoder_fingerprint, load_encoder
from openpae.models.priors import Refiner
from openpae.models.saved import write_prior
from openpae.plan.fakes import VITS
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask

OFF = {"loss.gan": 0.0, "loss.mcr": 0.0, "loss.ssr": 0.0, "loss.scr": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "L1 + LPIPS": {},
    "and SSR, SCR": {"loss.ssr": 0.2, "loss.scr": 1.0},
    "and MCR": {"loss.mcr": 0.5},
    "and GAN, adaptive": {"loss.gan": 0.5},
    "all": {"loss.ssr": 0.2, "loss.scr": 1.0, "loss.mcr": 0.5, "loss.gan": 0.5},
}


def main(size: int = 128, batch: int = 2, steps: int = 5, net: str = "vgg") -> None:
    """Print a table.

    Args:
        size: side of the images in pixels; the latent has one token for 16 x 16.
        batch: images per step.
        steps: measured steps of each row; the median counts.
        net: network of LPIPS.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        common = prepared(Path(name), size, batch, net)
        seconds = {row: step_seconds(common | OFF | losses, steps) for row, losses in ROWS.items()}
    print("| losses | CPU s a step | ratio |\n|---|---|---|")
    for row, cost in seconds.items():
        print(f"| {row} | {cost:.3f} | {cost / seconds['L1 + LPIPS']:.2f} |")


def prepared(folder: Path, size: int, batch: int, net: str) -> dict[str, Any]:
    """Write images, a discriminator's ViT and a prior; return the changes of the config."""
    random_images(folder / "images", 2 * batch, (size, size))
    ViTModel(ViTConfig(**VITS["facebook/dino-vits16"]), add_pooling_layer=False).save_pretrained(
        folder / "vit"
    )
    encoder = load_encoder("random-tiny")
    prior = Refiner(RefinerConfig(feature_dim=48, latent_dim=32, grid_size=size // 16, num_heads=4))
    (folder / "prior").mkdir()
    write_prior(folder / "prior", prior.state_dict(), prior.config, encoder_fingerprint(encoder))
    return {
        "model.image_size": size,
        "model.latent_dim": 32,
        "model.width": 384,
        "model.decoder": {"hidden_dim": 384, "num_layers": 12, "num_heads": 6, "mlp_dim": 1536},
        "data.images": str(folder / "images"),
        "loss.lpips_net": net,
        "loss.gan_start": 0.0,
        "loss.discriminator_start": 0.0,
        "loss.gan_weight": "adaptive",
        "loss.discriminator": {"source": str(folder / "vit")},
        "loop.global_batch_size": batch,
        "prior": str(folder / "prior"),
    }


def step_seconds(changes: dict[str, Any], steps: int) -> float:
    """Median CPU time of a step, after two steps that warm up."""
    run = configs.changed(configs.load(TokenizerRun, "tokenizer/tiny"), changes)
    task, times = TokenizerTask(run), [time.process_time()]
    for _ in trial_steps(task, run.optim, run.loop, range(1, steps + 3)):
        times.append(time.process_time())
    return median(after - before for before, after in pairwise(times[2:]))


if __name__ == "__main__":
    tyro.cli(main)
