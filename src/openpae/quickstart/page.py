"""The page that `pae quickstart` ends with: pictures, curves, metrics, settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.data.openmoji import CATEGORIES
from openpae.data.pixels import image_grid, pca_pictures, to_unit
from openpae.engine.journal import read_log
from openpae.models.tokenizer import Autoencoder
from openpae.objective.losses import perturb
from openpae.objective.settings import TokenizerLoss
from openpae.report import Page, png_bytes
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import read_json, whole_file
from openpae.storage.model_folder import PARTS, README, RECORD
from openpae.train.settings import TokenizerRun

_OPENMOJI = "All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0."


def quickstart_report(
    out: Path,
    seconds: Mapping[str, float],
    tokenizer: Autoencoder,
    judged: PackedImages,
    record: Mapping[str, Any],
    samples: Tensor,
    labels: Tensor,
    sampler: SamplerConfig,
) -> Path:
    """Write report.html, reconstructions.png and samples.png into a quickstart's folder.

    Args:
        out: the folder, with the run folders refiner, tokenizer and generator.
        seconds: time per stage.
        tokenizer: the trained one.
        judged: held-out emoji.
        record: what was measured of reconstructions and samples.
        samples: generated images in [0, 1], (n, 3, H, W).
        labels: their classes, (n,).
        sampler: how they were drawn.

    Returns:
        The page's path.
    """
    pairs, generated = record["reconstruction"]["metrics"], record["samples"]["metrics"]
    page = Page(
        "openpae quickstart",
        "A PAE tokenizer and a LightningDiT generator, trained on OpenMoji pictures (64 x 64, nine "
        "categories) "
        f"with a frozen, ImageNet-pretrained EfficientNet-Lite0, in {sum(seconds.values()) / 60:.1f} "
        "minutes.",
    )
    page.cards(
        {
            "PSNR of held-out emoji": f"{pairs['psnr']['value']:.1f} dB",
            "LPIPS (VGG)": f"{pairs['lpips']['value']:.3f}",
            "Frechet distance, reconstructions": f"{pairs['frechet']['value']:.1f}",
            "Frechet distance, samples": f"{generated['frechet']['value']:.1f}",
            "real against real": f"{generated['frechet_floor']['value']:.1f}",
        }
    )
    angles = configs.load(TokenizerRun, out / "tokenizer" / "config.yaml").loss.mcr_angles
    _show_pictures(page, out, tokenizer, judged, angles, samples, labels)
    page.heading("Training")
    page.charts(_curves(out / "refiner", "refiner", ("reconstruction", "gram"), ()), "steps of the refiner")
    terms = ("l1", "lpips", "gan", "ssr", "mcr", "scr")
    page.charts(_curves(out / "tokenizer", "autoencoder", terms, ("psnr",)), "steps of the tokenizer")
    page.charts(
        _curves(out / "generator", "generator", ("mse", "cosine"), ("mse",)), "steps of the generator"
    )
    page.heading("All metrics")
    page.table(
        ["metric", "value", "standard error", "over"],
        [*_rows("reconstruction", pairs), *_rows("samples", generated)],
    )
    page.text(
        "Frechet distances are taken in pooled VGG16 relu5_3 features (512-d), against held-out emoji for "
        "the "
        "reconstructions and against training pictures for the samples. They do not compare with a "
        "published FID. "
        "At such sample counts they are biased upwards: read them beside the distance of real to real "
        "pictures."
    )
    page.heading("Time and settings")
    page.table(["stage", "seconds"], [(name, f"{value:.0f}") for name, value in seconds.items()])
    for name in ("refiner", "tokenizer", "generator"):
        page.fold(f"{name}/config.yaml", (out / name / "config.yaml").read_text(encoding="utf-8"))
    page.fold("sampler", yaml.safe_dump(configs.to_dict(sampler), sort_keys=False))
    facts = {key: value for key, value in record["samples"].items() if key not in ("metrics", "kind")}
    page.fold("what the numbers were measured with", yaml.safe_dump(facts, sort_keys=False))
    page.text(_OPENMOJI)
    page.write(out / "report.html")
    return out / "report.html"


def pretrained_report(
    out: Path,
    folder: Path,
    seconds: Mapping[str, float],
    tokenizer: Autoencoder,
    judged: PackedImages,
    record: Mapping[str, Any],
    samples: Tensor,
    labels: Tensor,
    sampler: SamplerConfig,
) -> Path:
    """As `quickstart_report`, of a pretrained pair: pictures, and what was measured of it here and before.

    Args:
        out: where the page and the grids go.
        folder: the pair; its evaluation.json files are shown.
        seconds: time per stage.
        tokenizer: of the pair.
        judged: held-out emoji.
        record: what was measured of their reconstructions.
        samples: generated images in [0, 1], (n, 3, H, W).
        labels: their classes, (n,).
        sampler: how they were drawn.

    Returns:
        The page's path.
    """
    found = record["metrics"]
    page = Page(
        "openpae quickstart, pretrained",
        "A PAE tokenizer and a LightningDiT generator of OpenMoji pictures (64 x 64, nine categories), as "
        f"they come with the package, in {sum(seconds.values()):.0f} seconds.",
    )
    page.cards(
        {
            "PSNR of held-out emoji": f"{found['psnr']['value']:.1f} dB",
            "SSIM": f"{found['ssim']['value']:.3f}",
            "held-out emoji": f"{record['images']:,}",
            "generated": f"{len(samples):,}",
        }
    )
    _show_pictures(page, out, tokenizer, judged, TokenizerLoss().mcr_angles, samples, labels)
    page.heading("Metrics")
    header = ["metric", "value", "standard error", "over"]
    page.table(header, _rows("here", found))
    for part in PARTS:
        if (folder / part / RECORD).is_file():
            page.table(header, _rows(f"{part}, of the release", read_json(folder / part / RECORD)["metrics"]))
    page.fold("sampler", yaml.safe_dump(configs.to_dict(sampler), sort_keys=False))
    page.fold("model card", (folder / README).read_text(encoding="utf-8"))
    page.text(_OPENMOJI)
    page.write(out / "report.html")
    return out / "report.html"


def _show_pictures(
    page: Page,
    out: Path,
    tokenizer: Autoencoder,
    judged: PackedImages,
    angles: tuple[float, float],
    samples: Tensor,
    labels: Tensor,
) -> None:
    """Reconstructions, latents and samples; the grids are also kept as PNG files."""
    chosen = np.linspace(0, len(judged) - 1, 24).round().astype(np.int64)
    x = to_unit(judged.shards.gather(chosen))
    with torch.no_grad():
        z = tokenizer.encode(x)
        y = tokenizer.decode(z).clamp(0, 1)
    colours = pca_pictures(z, max(x.shape[-2:]))
    rows = [part for i in range(0, 24, 12) for part in (x[i : i + 12], y[i : i + 12], colours[i : i + 12])]
    pairs = image_grid(torch.cat(rows), 12)
    page.heading("Reconstruction of emoji that training never saw")
    page.picture(
        pairs, "Rows of three: picture, its reconstruction, its latent (first three principal components)."
    )
    direction = torch.randn(z[:12].shape, generator=torch.Generator().manual_seed(0))
    medium, large = angles
    with torch.no_grad():
        moved = [tokenizer.decode(perturb(z[:12], direction, angle)).clamp(0, 1) for angle in (medium, large)]
    page.heading("Small moves on the sphere change little")
    page.picture(
        image_grid(torch.cat([x[:12], y[:12], *moved]), 12),
        f"Picture x, its decode x_r, and the decodes x_m and x_l of its latent moved by {medium} and {large} "
        "degrees along one random direction: what MCR compares.",
    )
    columns = 12
    by_class = [samples[labels == k][:columns] for k in range(len(CATEGORIES))]
    grid = image_grid(torch.cat(by_class), columns)
    page.heading("Generated")
    page.picture(grid, f"One row per category: {', '.join(CATEGORIES)}.")
    for name, picture in (("reconstructions.png", pairs), ("samples.png", grid)):
        with whole_file(out / name) as partial:
            partial.write_bytes(png_bytes(picture))


def _curves(
    run_dir: Path, player: str, terms: tuple[str, ...], judged: tuple[str, ...]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    lines = read_log(run_dir)

    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in lines if key in line]

    curves = {term: {"training": points(f"{player}/{term}")} for term in terms}
    for term in judged:
        curves.setdefault(f"{term} of held-out images", {})["held out"] = points(f"eval/{term}")
    return curves


def _rows(kind: str, metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (
            f"{kind}: {name}",
            f"{metric['value']:.4g}",
            "" if metric["stderr"] is None else f"{metric['stderr']:.2g}",
            f"{metric['n']:,} {metric['over']}",
        )
        for name, metric in metrics.items()
    ]
