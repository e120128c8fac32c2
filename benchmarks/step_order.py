"""The tokenizer step with L1, LPIPS and an adaptive GAN, beside the usual order of its passes.

The usual loop (taming-transformers, RAE's stage 1) is rewritten here with our networks, so that only its
order of passes and its LPIPS differ: two backward passes of LPIPS and of the discriminator, the adaptive
weight's and the step's, a second pass of the decodes for the discriminator's own step, and package lpips.
Both step the same optimizers and average the weights. Median CPU time of steps in turn, in one process.

    OMP_NUM_THREADS=1 python benchmarks/step_order.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import lpips
import torch
import tyro
from step_cost import OFF, ROWS, prepared
from torch import Tensor
from torch.nn import functional as F

from openpae import config as configs
from openpae.engine.ema import Ema
from openpae.engine.loop import trial_steps
from openpae.models.discriminator import AUGMENT_DRAWS, diff_augment, frozen, norms_once
from openpae.objective.losses import adaptive_weight, discriminator_hinge, generator_hinge
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask


def main(size: int = 128, batch: int = 2, steps: int = 5) -> None:
    """Print the seconds of both and their ratio.

    Args:
        size: side of the images in pixels.
        batch: images per step.
        steps: measured steps of each, after one that warms up.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        changes = prepared(Path(name), size, batch, "vgg") | OFF | ROWS["and GAN, adaptive"]
        run = configs.changed(configs.load(TokenizerRun, "tokenizer/tiny"), changes)
        ours, usual = TokenizerTask(run), TokenizerTask(run)
        kinds = {
            "ours": trial_steps(ours, run.optim, run.loop, range(1, steps + 2)),
            "usual": usual_steps(usual, torch.rand(steps + 1, batch, 3, size, size)),
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(steps + 1):
            for kind, states in kinds.items():
                start = time.process_time()
                next(states)
                times[kind].append(time.process_time() - start)
    one, two = (median(times[kind][1:]) for kind in kinds)
    print(f"| tokenizer step | {one:.3f} | {two:.3f} | {two / one:.2f} |")


def usual_steps(task: TokenizerTask, images: Tensor) -> Iterator[None]:
    """Steps in the usual order, on images (steps, B, 3, H, W)."""
    model, discriminator = task.model, task.discriminator
    assert discriminator is not None
    last, average = model.decoder.to_pixels.weight, Ema(model, 0.9999)
    perceptual = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    for x in images:
        draws = torch.rand(len(x), AUGMENT_DRAWS)
        with norms_once(discriminator):
            _, (decoded,) = model(x)
            reconstruction = F.l1_loss(decoded, x) + perceptual(decoded, x, normalize=True).mean()
            with frozen(discriminator):
                adversarial = generator_hinge(discriminator(diff_augment(decoded, draws)))
            norms = [
                torch.autograd.grad(loss, last, retain_graph=True)[0]
                for loss in (reconstruction, adversarial)
            ]
            (reconstruction + 0.5 * adaptive_weight(*norms) * adversarial).backward()
            finish(task, "autoencoder")
            real, fake = (discriminator(diff_augment(picture, draws)) for picture in (x, decoded.detach()))
            discriminator_hinge(real, fake).backward()
            finish(task, "discriminator")
        average.update()
        yield


def finish(task: TokenizerTask, player: str) -> None:
    """Clip and step."""
    optimizer = task.optimizers[player]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    tyro.cli(main)
