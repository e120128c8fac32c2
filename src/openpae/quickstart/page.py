"""The page that `pae quickstart` ends with: pictures, curves, metrics, settings.

No heading claims what the numbers below it could refute: headings are made from the numbers.
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
    "psnr": ("PSNR ↑", "how close reconstructions are to their pictures, in dB"),
    "ssim": ("SSIM ↑", "how much of the local structure they keep, up to 1"),
    "lpips": ("LPIPS ↓", "how different they look to a network, from 0"),
    "frechet": ("Frechet distance ↓", "how far the set of pictures is from real ones, in VGG16 features"),
    "kid": ("KID ↓", "the same, by another measure that does not depend on the number of pictures"),
    "precision": ("precision ↑", "share of the pictures that lie among real ones"),
    "recall": ("recall ↑", "share of real pictures that lie among these"),
    "class_agreement": ("class agreement ↑", "share whose nearest training picture has the class asked for"),
    "class_agreement_of_held_out": ("class agreement of real pictures", "the same of held-out pictures"),
    "frechet_floor": ("real against real", "Frechet distance of real pictures to others, as many as here"),
}
"""Title and meaning of each metric."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that a quickstart made."""

    out: Path
    """Its folder; the page and its pictures go there."""
    seconds: Mapping[str, float]
    """Time of each stage."""
    tokenizer: Autoencoder
    """With its encoder, in evaluation mode."""
    held_out: PackedImages
    """Emoji that training never saw."""
    record: Mapping[str, Any]
    """What was measured: reconstruction, samples (where it was), free, recognised."""
    samples: Tensor
    """Generated images in [0, 1], (n, 3, H, W)."""
    labels: Tensor
    """Their classes, (n,)."""
    sampler: SamplerConfig
    """How they were drawn."""


def quickstart_report(result: Result, verdict: str = "") -> Path:
    """Write report.html, reconstructions.png and samples.png into a quickstart's folder.

    Args:
        result: of a quickstart with its run folders refiner, tokenizer and generator.
        verdict: that the result is of no use, and why; the first line of the page.

    Returns:
        The page's path.
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
        "Frechet distances are taken in pooled VGG16 relu5_3 features (512-d), against held-out emoji for "
        "the reconstructions and against training pictures for the samples. They do not compare with a "
        "published FID. At such sample counts they are biased upwards: read them beside the distance of "
        "real to real pictures."
    )
    _show_training(page, result.out)
    page.heading("Time and settings")
    page.table(["stage", "seconds"], [(name, f"{value:.0f}") for name, value in result.seconds.items()])
    for name in _STAGES:
        page.fold(f"{name}/config.yaml", (result.out / name / "config.yaml").read_text(encoding="utf-8"))
    _fold(page, "sampler", configs.to_dict(result.sampler))
    facts = {key: value for key, value in result.record["samples"].items() if key not in ("metrics", "kind")}
    _fold(page, "what the numbers were measured with", facts)
    page.text(_OPENMOJI)
    page.write(result.out / "report.html")
    return result.out / "report.html"


def pretrained_report(result: Result, folder: Path) -> Path:
    """As `quickstart_report`, of a pretrained pair: pictures, and what was measured of it here and before.

    Args:
        result: of the pair; its samples are not measured.
        folder: the pair; its evaluation.json files are shown.

    Returns:
        The page's path.
    """
    page = _page(
        "openpae quickstart, pretrained",
        "A PAE tokenizer and a LightningDiT generator of OpenMoji pictures (64 x 64, nine categories), as "
        f"they come with the package, in {sum(result.seconds.values()):.0f} seconds.",
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
    page.text("Measured when the pair was released; recognised emoji and mean colours were measured here.")
    _fold(page, "sampler", configs.to_dict(result.sampler))
    page.fold("model card", (folder / README).read_text(encoding="utf-8"))
    page.text(_OPENMOJI)
    page.write(result.out / "report.html")
    return result.out / "report.html"


def metrics_table(record: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of the table of all metrics: in words, an arrow for better, beside what costs nothing.

    Args:
        record: reconstruction, samples, free and recognised, as far as they were measured.
    """
    free = record.get("free", {})
    beside = {
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
            rows.append((of, title, value, meaning, beside.get((kind, name), ""), over))
    if found := record.get("recognised"):
        for angle, share in found["shares"].items():
            title = "recognised ↑" if angle == "0" else f"recognised after {angle} degrees ↑"
            meaning = "share of decodes whose nearest picture in the VFM's features is their own"
            chance = f"chance: {1 / found['among']:.1%}"
            rows.append(
                ("reconstructions", title, f"{share:.0%}", meaning, chance, f"{found['decodes']} emoji")
            )
    return ["of", "metric", "value", "what it says", "beside it", "over"], rows


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
        found = record["samples"]["metrics"]
        cards["Frechet distance, samples"] = f"{found['frechet']['value']:.1f}"
        cards["real against real"] = f"{found['frechet_floor']['value']:.1f}"
    return cards


def _show_pictures(page: Page, result: Result) -> None:
    """Reconstructions, moved latents and samples; the grids are also kept as PNG files."""
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
    page.heading(
        f"Emoji that training never saw come back at {psnr:.1f} dB; {shares['0']:.0%} are recognised"
    )
    page.rows(
        {name: _row(part) for name, part in strips.items()},
        "The colours of a latent are its first three principal components. The mean colour of each patch "
        f"alone would give {free:.1f} dB.",
    )
    _show_moves(page, result, x[:_COLUMNS], z[:_COLUMNS], y[:_COLUMNS])
    by_class = {name: result.samples[result.labels == k][:_COLUMNS] for k, name in enumerate(CATEGORIES)}
    page.heading(_generated(result.record))
    page.rows(
        {name: _row(part) for name, part in by_class.items()}, "Not chosen: the first of each category."
    )
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
            strips[f"moved by {angle}°"] = _row(result.tokenizer.decode(moved).clamp(0, 1))
    moves = ", ".join(f"{shares[angle]:.0%} after {angle} degrees" for angle in angles)
    page.heading(f"Recognised after a move on the sphere: {moves}")
    page.rows(
        strips,
        "Decodes of the latent, and of the latent moved along one random direction: what MCR compares. "
        f"Without a move, {shares['0']:.0%} are recognised.",
    )


def _generated(record: Mapping[str, Any]) -> str:
    if "samples" not in record:
        return "Generated"
    found = record["samples"]["metrics"]
    return (
        f"Generated, at a Frechet distance of {found['frechet']['value']:.0f}: real pictures are at "
        f"{found['frechet_floor']['value']:.0f}, the mean picture at {record['free']['frechet']:.0f}"
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
    """Charts of a run's log; terms that it does not have are left out."""
    lines = read_log(run_dir)

    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in lines if key in line]

    curves = {term: {"training": points(f"{player}/{term}")} for term in terms}
    for term in held_out:
        curves.setdefault(f"{term} of held-out images", {})["held out"] = points(f"eval/{term}")
    return {title: drawn for title, drawn in curves.items() if any(drawn.values())}


def _row(images: Tensor) -> Image.Image:
    return image_grid(images, len(images))


def _fold(page: Page, title: str, facts: Mapping[str, Any]) -> None:
    page.fold(title, yaml.safe_dump(dict(facts), sort_keys=False))
