"""Does each loss of the objective do what it is for? (SSR, MCR, SCR; Eq. 3-5 of arXiv:2605.07915)

Trains tokenizers that differ in their losses alone (same budget, same seed) on photographs, measures each on
held-out images, and writes a table. An interrupted study goes on; a finished run is not done again.

    python benchmarks/objective.py --train DATA/train --held-out DATA/val --out runs/objective
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from openpae import config as configs
from openpae.data.images import ImageFolder, PackedImages, Subset
from openpae.data.packing import pack_images
from openpae.eval.reconstruction import psnr
from openpae.geometry.metrics import global_semantic_quality, latent_perturbation_consistency
from openpae.models.layers import to_tokens
from openpae.models.lpips_weights import load_lpips
from openpae.models.saved import load_prior, load_tokenizer
from openpae.objective.losses import gram_alignment, perturb
from openpae.storage.files import read_json, write_json
from openpae.train.refiner import train_refiner
from openpae.train.settings import RefinerRun, TokenizerRun
from openpae.train.tokenizer import train_tokenizer

# The paper's weights, not the quickstart's; AlexNet in place of VGG16, for a CPU.
PAPER = {"lpips": 1.0, "lpips_share": 1.0, "mcr_share": 1.0, "mcr_start": 0.0, "gan": 0.0}
OFF = {"ssr": 0.0, "mcr": 0.0, "scr": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "SSR": {"ssr": 0.2},
    "MCR": {"mcr": 0.5},
    "SCR": {"scr": 1.0},
    "full": {"ssr": 0.2, "mcr": 0.5, "scr": 1.0},
    "MCR small": {"mcr": 0.5, "mcr_design": "small"},
    "MCR large": {"mcr": 0.5, "mcr_design": "large"},
    "SSR + SCR": {"ssr": 0.2, "scr": 1.0},
    "full, MCR small": {"ssr": 0.2, "mcr": 0.5, "mcr_design": "small", "scr": 1.0},
    "full, MCR large": {"ssr": 0.2, "mcr": 0.5, "mcr_design": "large", "scr": 1.0},
    "SSR at weight 2": {"ssr": 2.0},
}


def main(
    train: Path,
    held_out: Path,
    out: Path,
    every: int = 10,
    steps: int = 1200,
    refiner_steps: int = 400,
    batch_size: int = 16,
    variants: tuple[str, ...] = tuple(VARIANTS),
    seeds: tuple[int, ...] = (0,),
) -> None:
    """Train, measure, write table.md and results.json.

    Args:
        train: folder of training images, one subfolder per class.
        held_out: folder of other images of the same classes.
        out: everything goes here.
        every: take every n-th training image (500 a class: 10 leaves 50).
        steps: of each tokenizer.
        refiner_steps: of the refiner.
        batch_size: images per step.
        variants: which to run.
        seeds: of initial weights, data order and noise; the refiner has one.
    """
    out.mkdir(parents=True, exist_ok=True)
    sources = ImageFolder(train), ImageFolder(held_out)
    pack_images(Subset(sources[0], range(0, len(sources[0]), every)), out / "train", size=64)
    judged = pack_images(Subset(sources[1], range(0, len(sources[1]), 5)), out / "held-out", size=64)
    refiner = configs.load(RefinerRun, "refiner/quickstart")
    data = {"images": out / "train", "augment": "flip", "feature_cache": out / "features"}
    refiner = dataclasses.replace(
        refiner,
        data=dataclasses.replace(refiner.data, **data),
        loop=dataclasses.replace(refiner.loop, steps=refiner_steps),
    )
    train_refiner(refiner, out / "refiner")
    results = read_json(out / "results.json") if (out / "results.json").is_file() else {}
    for seed, variant in itertools.product(seeds, variants):
        name = variant if seed == 0 else f"{variant}, seed {seed}"
        if name in results:
            continue
        start = time.perf_counter()
        weights = PAPER | OFF | VARIANTS[variant]
        run = configs.load(TokenizerRun, "tokenizer/quickstart")
        run = dataclasses.replace(
            run,
            prior=out / "refiner" if weights["ssr"] or weights["scr"] else None,
            data=dataclasses.replace(run.data, evaluation=None, **data),
            loss=dataclasses.replace(run.loss, **weights),
            loop=dataclasses.replace(
                run.loop,
                steps=steps,
                global_batch_size=batch_size,
                evaluate_every=0,
                save_every=400,
                seed=seed,
            ),
        )
        folder = out / name.replace(",", "").replace(" ", "-")
        train_tokenizer(run, folder)
        seconds = time.perf_counter() - start
        results[name] = measure(folder, out / "refiner", judged) | {"seconds": seconds}
        write_json(out / "results.json", results)
        (out / "table.md").write_text(table(results), encoding="utf-8")
    print((out / "table.md").read_text(encoding="utf-8"))


@torch.no_grad()
def measure(tokenizer: Path, refiner: Path, judged: PackedImages) -> dict[str, float]:
    """PSNR, Gram disagreement with the prior, LPIPS (VGG) under perturbation, LPC, GSQ of held-out images."""
    model, prior, lpips = load_tokenizer(tokenizer), load_prior(refiner), load_lpips("vgg")
    values: dict[str, list[torch.Tensor]] = {"psnr": [], "gram": [], "lpips_42": [], "lpips_85": []}
    latents = []
    generator = torch.Generator().manual_seed(0)
    for rows in torch.arange(len(judged)).split(50):
        x = judged.shards.gather(rows.numpy()).float() / 255
        features = model.features(x)
        z = model.encode(x, features)
        latents.append(z)
        direction = torch.randn(z.shape, generator=generator)
        x_r, x_m, x_l = (
            model.decode(latent).clamp(0, 1)
            for latent in (z, perturb(z, direction, 42.5), perturb(z, direction, 85.0))
        )
        target = prior(features)
        values["psnr"].append(psnr(x, x_r))
        values["gram"] += [
            gram_alignment(a[None], b[None])[None] for a, b in zip(to_tokens(z), target, strict=True)
        ]
        anchor = lpips.features(x_r)
        values["lpips_42"].append(lpips.distance(anchor, lpips.features(x_m)))
        values["lpips_85"].append(lpips.distance(anchor, lpips.features(x_l)))
    result: dict[str, float] = {}
    for name, parts in values.items():
        numbers = torch.cat(parts).double()
        result[name] = float(numbers.mean())
        result[f"{name}_stderr"] = float(numbers.std() / len(numbers) ** 0.5)
    z = torch.cat(latents)
    gsq = global_semantic_quality(z, torch.from_numpy(judged.labels))
    lpc = latent_perturbation_consistency(z[::5], lambda z: model.decode(z).clamp(0, 1), lpips)
    for estimate in (gsq, lpc):
        result |= {estimate.name: estimate.value, f"{estimate.name}_stderr": estimate.stderr or 0.0}
    return result


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown."""
    columns = {
        "gram": "Gram error (SSR), lower",
        "lpips_42": "LPIPS at 42.5 deg (MCR), lower",
        "lpips_85": "LPIPS at 85 deg (MCR), lower",
        "lpc": "LPC, lower",
        "gsq": "GSQ (SCR), higher",
        "psnr": "PSNR, dB",
    }
    lines = [
        "| losses | " + " | ".join(columns.values()) + " | training, s |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, row in results.items():
        cells = [f"{row[key]:.4f} +- {row[f'{key}_stderr']:.4f}" for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
