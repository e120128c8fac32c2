"""The report of `pae quickstart`: pictures, curves, metrics, settings.

Headings are computed from the measured numbers, so that they never contradict them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.data.openmoji import CATEGORIES
from openpae.data.pixels import image_grid, pca_pictures
from openpae.engine.journal import read_log
from openpae.models.tokenizer import Autoencoder
from openpae.objective.losses import perturb
from openpae.report import Page, png_bytes
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import atomic_file, read_json
from openpae.storage.model_folder import PARTS, README, RECORD

_OPENMOJI = "All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0."
_COLUMNS = 8
_STAGES = ("refiner", "tokenizer", "generator")

_WORDS = {
    "psnr": ("PSNR ↑", "similarity of a reconstruction to its picture, in dB"),
    "ssim": ("SSIM ↑", "similarity of the local structure, at most 1"),
    "lpips": ("LPIPS ↓", "perceptual difference in the features of a network, at least 0"),
    "frechet": ("Frechet distance ↓", "distance of the set of pictures to real pictures, in VGG16 features"),
    "kid": ("KID ↓", "another distance, whose mean does not depend on the number of pictures"),
    "mind": ("MIND ↓", "another distance, of sorted projections; it needs fewer pictures"),
    "precision": ("precision ↑", "share of these pictures that lie among real ones"),
    "recall": ("recall ↑", "share of real pictures that lie among these"),
    "class_agreement": ("class agreement ↑", "share whose nearest training picture has the requested class"),
    "class_agreement_of_held_out": ("class agreement of real pictures", "the same for held-out pictures"),
    "frechet_floor": (
        "real against real",
        "Frechet distance between two sets of real pictures of this count",
    ),
    "frechet_ratio": ("Frechet distance / real against real ↓", "1 is the distance of real pictures"),
}
"""Title and meaning of each metric."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that the report shows."""

    out: Path
    """Folder of the report and its pictures."""
    seconds: Mapping[str, float]
    """Seconds of each stage."""
    tokenizer: Autoencoder
    """The tokenizer with its encoder, in evaluation mode."""
    held_out: PackedImages
    """Held-out emoji."""
    record: Mapping[str, Any]
    """The measured values: reconstruction, samples (optional), free (baselines), recognised."""
    samples: Tensor
    """Generated images in [0, 1], (n, 3, H, W)."""
    labels: Tensor
    """Classes of the samples, (n,)."""
    sampler: SamplerConfig
    """Sampler of the samples."""


def quickstart_report(result: Result, verdict: str = "") -> Path:
    """Write report.html, reconstructions.png and samples.png.

    Args:
        result: result of a quickstart; its folder holds the run folders refiner, tokenizer and generator.
        verdict: why the result is not usable, as the first line of the page; empty if it is usable.

    Returns:
        Path of the page.
    """
    minutes = sum(result.seconds.values()) / 60
    page = _page(
        "openpae quickstart",
        "A PAE tokenizer and a LightningDiT generator, trained on OpenMoji pictures (64 x 64, nine "
        f"categories) with a frozen, ImageNet-pretrained EfficientNet-Lite0, in {minutes:.1f} minutes.",
        verdict,
    )
    page.cards(_cards(result.record))
    _show_pictures(page, result)
    page.heading("The numbers")
    page.table(*metrics_table(result.record))
    page.text(
        "Frechet distances use pooled VGG16 relu5_3 features (512-d). The reference is held-out emoji for "
        "reconstructions, and training pictures for samples. The distances are not comparable with published "
        "FIDs. At these sample counts they are biased upwards: compare them with real against real."
    )
    _show_training(page, result.out)
    page.heading("Time and settings")
    page.table(["stage", "seconds"], [(name, f"{value:.0f}") for name, value in result.seconds.items()])
    for name in _STAGES:
        page.fold(f"{name}/config.yaml", (result.out / name / "config.yaml").read_text(encoding="utf-8"))
    _fold(page, "sampler", configs.to_dict(result.sampler))
    samples = result.record["samples"]
    settings = {key: value for key, value in samples.items() if key not in ("metrics", "kind")}
    _fold(page, "settings of the measurements", settings)
    page.text(_OPENMOJI)
    page.write(result.out / "report.html")
    return result.out / "report.html"


def pretrained_report(result: Result, folder: Path) -> Path:
    """Write the report of pretrained models: pictures, new measurements, and those of the release.

    Args:
        result: result of the models; its samples are not measured.
        folder: the models with their evaluation.json files.

    Returns:
        Path of the page.
    """
    page = _page(
        "openpae quickstart, pretrained",
        "A PAE tokenizer and a LightningDiT generator of OpenMoji pictures (64 x 64, nine categories), "
        f"shipped with the package, in {sum(result.seconds.values()):.0f} seconds.",
        "",
    )
    page.cards(_cards(result.record))
    _show_pictures(page, result)
    page.heading("The numbers")
    record = dict(result.record)
    for part, name in zip(PARTS, ("reconstruction", "samples"), strict=True):
        if (folder / part / RECORD).is_file():
            record[name] = read_json(folder / part / RECORD)
    page.table(*metrics_table(record))
    page.text("Measured for the release, except recognised emoji and mean colours, which were measured now.")
    _fold(page, "sampler", configs.to_dict(result.sampler))
    page.fold("model card", (folder / README).read_text(encoding="utf-8"))
    page.text(_OPENMOJI)
    page.write(result.out / "report.html")
    return result.out / "report.html"


def metrics_table(record: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return header and rows of the table of all metrics, with baselines. Arrows point to better values.

    Args:
        record: reconstruction, samples, free (baselines) and recognised, as far as they were measured.
    """
    free = record.get("free", {})
    baselines = {
        ("reconstruction", "psnr"): "mean colour of each patch: {:.2f}".format(free["psnr"]) if free else "",
        ("samples", "frechet"): f"mean picture, repeated: {free['frechet']:.1f}" if "frechet" in free else "",
    }
    rows: list[tuple[str, ...]] = []
    for kind, of in (("reconstruction", "reconstructions"), ("samples", "samples")):
        for name, metric in record.get(kind, {}).get("metrics", {}).items():
            title, meaning = _WORDS.get(name, (name, ""))
            error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.2g}"
            value = f"{metric['value']:.4g}{error}"
            over = f"{metric['n']:,} {metric['over']}"
            rows.append((of, title, value, meaning, baselines.get((kind, name), ""), over))
    if recognised := record.get("recognised"):
        for angle, share in recognised["shares"].items():
            title = "recognised ↑" if angle == "0" else f"recognised after {angle} degrees ↑"
            meaning = (
                "share of decoded pictures whose nearest picture in the VFM's features is their original"
            )
            chance, count = f"chance: {1 / recognised['among']:.1%}", f"{recognised['decodes']} emoji"
            rows.append(("reconstructions", title, f"{share:.0%}", meaning, chance, count))
    return ["of", "metric", "value", "meaning", "baseline", "over"], rows


def _page(title: str, lead: str, verdict: str) -> Page:
    if not verdict:
        return Page(title, lead)
    page = Page(title, verdict[0].upper() + verdict[1:] + ".")
    page.text(lead)
    return page


def _cards(record: Mapping[str, Any]) -> dict[str, str]:
    pairs = record["reconstruction"]["metrics"]
    cards = {
        "PSNR of held-out emoji": f"{pairs['psnr']['value']:.1f} dB",
        "PSNR of the mean colour of each patch": f"{record['free']['psnr']:.1f} dB",
        "reconstructions recognised": f"{record['recognised']['shares']['0']:.0%}",
    }
    if "samples" in record:
        metrics = record["samples"]["metrics"]
        cards["Frechet distance, samples"] = f"{metrics['frechet']['value']:.1f}"
        cards["real against real"] = f"{metrics['frechet_floor']['value']:.1f}"
    return cards


def _show_pictures(page: Page, result: Result) -> None:
    """Show reconstructions, rotated latents and samples; also save the grids as PNG files."""
    chosen = np.linspace(0, len(result.held_out) - 1, 2 * _COLUMNS).round().astype(np.int64)
    x = result.held_out.shards.gather(chosen).float() / 255
    with torch.no_grad():
        z = result.tokenizer.encode(x)
        y = result.tokenizer.decode(z).clamp(0, 1)
    colours = pca_pictures(z, max(x.shape[-2:]))
    strips = {
        f"{name} {start + 1}-{start + _COLUMNS}": part[start : start + _COLUMNS]
        for start in (0, _COLUMNS)
        for name, part in (("picture", x), ("reconstruction", y), ("latent", colours))
    }
    psnr = result.record["reconstruction"]["metrics"]["psnr"]["value"]
    free, shares = result.record["free"]["psnr"], result.record["recognised"]["shares"]
    page.heading(f"Held-out emoji are reconstructed at {psnr:.1f} dB; {shares['0']:.0%} are recognised")
    page.rows(
        {name: _row(part) for name, part in strips.items()},
        "The colours of a latent are its first three principal components. The mean colour of each patch "
        f"gives {free:.1f} dB.",
    )
    _show_moves(page, result, x[:_COLUMNS], z[:_COLUMNS], y[:_COLUMNS])
    by_class = {name: result.samples[result.labels == k][:_COLUMNS] for k, name in enumerate(CATEGORIES)}
    page.heading(_generated(result.record))
    page.rows({name: _row(part) for name, part in by_class.items()}, "Not selected: the first of each class.")
    pictures = {
        "reconstructions.png": image_grid(torch.cat(list(strips.values())), _COLUMNS),
        "samples.png": image_grid(torch.cat(list(by_class.values())), _COLUMNS),
    }
    for name, picture in pictures.items():
        with atomic_file(result.out / name) as partial:
            partial.write_bytes(png_bytes(picture))


def _show_moves(page: Page, result: Result, x: Tensor, z: Tensor, y: Tensor) -> None:
    shares = result.record["recognised"]["shares"]
    angles = [angle for angle in shares if angle != "0"]
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    strips = {"picture x": _row(x), "its decode": _row(y)}
    with torch.no_grad():
        for angle in angles:
            moved = perturb(z, direction, float(angle), result.tokenizer.config.sphere)
            strips[f"rotated by {angle}°"] = _row(result.tokenizer.decode(moved).clamp(0, 1))
    moves = ", ".join(f"{shares[angle]:.0%} after {angle} degrees" for angle in angles)
    page.heading(f"Recognised after a rotation on the sphere: {moves}")
    page.rows(
        strips,
        "Decoded latents, and latents rotated along one random direction, as in MCR. "
        f"Without a rotation, {shares['0']:.0%} are recognised.",
    )


def _generated(record: Mapping[str, Any]) -> str:
    if "samples" not in record:
        return "Generated"
    metrics = record["samples"]["metrics"]
    return (
        f"Generated, at a Frechet distance of {metrics['frechet']['value']:.0f}: real pictures are at "
        f"{metrics['frechet_floor']['value']:.0f}, the mean picture at {record['free']['frechet']:.0f}"
    )


def _show_training(page: Page, out: Path) -> None:
    page.heading("Training")
    page.charts(_curves(out / "refiner", "refiner", ("reconstruction", "gram"), ()), "steps of the refiner")
    terms = ("l1", "lpips", "gan", "ssr", "mcr", "scr")
    page.charts(_curves(out / "tokenizer", "autoencoder", terms, ("psnr",)), "steps of the tokenizer")
    page.charts(
        _curves(out / "generator", "generator", ("mse", "cosine"), ("mse",)), "steps of the generator"
    )


def _curves(
    run_dir: Path, player: str, terms: Sequence[str], held_out: Sequence[str]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return charts of a run's log, without terms that it lacks."""
    lines = read_log(run_dir)

    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in lines if key in line]

    curves = {term: {"training": points(f"{player}/{term}")} for term in terms}
    for term in held_out:
        curves.setdefault(f"{term} of held-out images", {})["held out"] = points(f"eval/{term}")
    return {title: drawn for title, drawn in curves.items() if any(drawn.values())}


def _row(images: Tensor) -> Image.Image:
    return image_grid(images, len(images))


def _fold(page: Page, title: str, data: Mapping[str, Any]) -> None:
    page.fold(title, yaml.safe_dump(dict(data), sort_keys=False))
