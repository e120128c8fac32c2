"""The page of `pae profile`: numbers and pictures of latent spaces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from openpae.data.crops import Size, height_width
from openpae.data.images import ImageSource, chosen_rows, spread
from openpae.data.label_maps import Segmented
from openpae.data.pixels import framed, image_grid, label_pictures, pca_pictures, thumbnails, to_unit
from openpae.eval.estimate import Estimate
from openpae.eval.extractors import INCEPTION
from openpae.eval.image_stream import source_batches
from openpae.geometry.clusters import spectral_clusters
from openpae.geometry.measure import Measured
from openpae.geometry.metrics import RADII, majority_labels, moved_latents, unit_directions
from openpae.geometry.settings import MeasureConfig
from openpae.interop.spaces import Tokenizer
from openpae.report import Page
from openpae.runtime.extras import needs


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The texts of a metric on the page."""

    title: str
    better: Literal["higher", "lower"]
    on_radar: bool = False
    """Whether it is an axis of the radar plot: it, or 1 minus it if lower is better, is in [0, 1]."""
    meaning: str


METRICS = {
    "ssc": Metric(
        title="SSC",
        better="higher",
        on_radar=True,
        meaning="spatial structure: do tokens cluster as the segments of the image? NMI, 0 to 1",
    ),
    "lpc": Metric(
        title="LPC",
        better="lower",
        on_radar=True,
        meaning="continuity: how much do moves of the latent change its image? LPIPS; 0 also where a decoder "
        "ignores its latent, so read it beside the LPIPS of reconstructions",
    ),
    "gsq": Metric(
        title="GSQ",
        better="higher",
        on_radar=True,
        meaning="semantics: share of images whose nearest neighbour is of their class",
    ),
    "erank": Metric(
        title="eRank",
        better="higher",
        on_radar=True,
        meaning="diagnostic: share of its channels that the pooled latent uses",
    ),
    "viv": Metric(
        title="VIV",
        better="lower",
        meaning="what a generator cannot know of the velocity, from the covariance within classes "
        "(arXiv:2606.03578)",
    ),
    "sec": Metric(
        title="SEC",
        better="lower",
        on_radar=True,
        meaning="share of high spatial frequencies in the latent's energy (arXiv:2606.03578)",
    ),
    "lnc": Metric(
        title="LNC",
        better="higher",
        on_radar=True,
        meaning="share of the five nearest images that have the same class (arXiv:2606.03578)",
    ),
    "srss": Metric(
        title="SRSS",
        better="higher",
        meaning="cosine of tokens within a segment, minus that across segments (arXiv:2512.10794)",
    ),
    "psnr": Metric(title="PSNR", better="higher", meaning="of reconstructions, in dB"),
    "ssim": Metric(title="SSIM", better="higher", on_radar=True, meaning="of reconstructions, up to 1"),
    "lpips": Metric(
        title="LPIPS", better="lower", on_radar=True, meaning="perceptual distance of reconstructions"
    ),
    "frechet": Metric(
        title="rFD", better="lower", meaning="Frechet distance of reconstructions to the images (rFID's kind)"
    ),
    "interpolated_frechet": Metric(
        title="iFD",
        better="lower",
        meaning="Frechet distance of images decoded half way to the nearest other latent (iFID's kind, "
        "arXiv:2603.05630)",
    ),
}
"""In display order."""

_SHOWN = 8  # images in a row
_SIDE = 128  # largest side of each, in pixels


def profile_page(
    measured: Sequence[Measured],
    spaces: Sequence[Tokenizer],
    source: ImageSource,
    size: Size,
    segmented: Segmented | None,
    facts: Mapping[str, Any],
    config: MeasureConfig,
) -> Page:
    """Numbers, then pictures. Several tokenizers also get a radar plot.

    Args:
        measured: the measurements.
        spaces: the tokenizers, in the same order.
        source: the measured images.
        size: (H, W) of all images, or the side of squares.
        segmented: the images of SSC.
        facts: what the numbers depend on.
        config: settings of the metrics.
    """
    several = len(measured) > 1
    shapes = "; ".join(f"{one.name} {' x '.join(map(str, one.latent_shape))}" for one in measured)
    height, width = height_width(size)
    page = Page(
        "Latent spaces compared" if several else f"The latent space of {measured[0].name}",
        f"{facts['images']['measured']:,} images of {height} x {width} pixels. Latents, C x h x w: {shapes}.",
    )
    _show_numbers(page, measured, facts)
    if several:
        _show_radar(page, measured)
    rows = chosen_rows(source, config.count)
    pixels = _shown(source, rows[spread(len(rows), _SHOWN)], size)
    with torch.no_grad():
        _show_latents(page, spaces, pixels)
        if segmented is not None:
            _show_segments(page, spaces, segmented, config)
        _show_moves(page, spaces, pixels[spread(len(pixels), 3)], config)
    _show_neighbours(page, measured, source, rows, size)
    _show_spectrum(page, measured)
    page.heading("Settings")
    page.fold("what the numbers were measured with", yaml.safe_dump(dict(facts), sort_keys=False))
    return page


def _show_numbers(page: Page, measured: Sequence[Measured], facts: Mapping[str, Any]) -> None:
    page.heading("Numbers")
    rows = []
    for name, metric in METRICS.items():
        estimates = [one.metrics.get(name) for one in measured]
        if over := next((f"{e.n:,} {e.over}" for e in estimates if e is not None), None):
            title = f"{metric.title} {'↑' if metric.better == 'higher' else '↓'}"
            rows.append((title, *map(_number, estimates), over, metric.meaning))
    page.table(["± standard error", *(one.name for one in measured), "over", "what it says"], rows)
    if floor := facts.get("frechet_floor"):
        half = f"{floor['settings']['samples']:,}"
        extractor = facts["extractor"]["name"]
        published = "only at the same number" if extractor == INCEPTION else "with none, in these features"
        page.text(
            f"Frechet distances are in features of {extractor}. They fall as the number of images grows, so "
            f"they compare with published ones {published}. Real images against real ones, {half} "
            f"against {half}, give {floor['value']:.4g}."
        )
    for reason, titles in _reasons(measured).items():
        page.text(f"{', '.join(titles)} not defined: {reason}.")


def _number(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not defined"
    if not estimate.stderr:
        return f"{estimate.value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(estimate.stderr)))  # two of the error
    return f"{estimate.value:.{digits}f} ± {estimate.stderr:.{digits}f}"


def _reasons(measured: Sequence[Measured]) -> dict[str, list[str]]:
    """Reason -> titles of the metrics that are undefined for it."""
    reasons: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        for reason in dict.fromkeys(one.undefined[name] for one in measured if name in one.undefined):
            reasons.setdefault(reason, []).append(metric.title)
    return reasons


def radar_scores(measured: Sequence[Measured]) -> dict[str, list[float | None]]:
    """Title of each axis -> score of each tokenizer divided by the best, in [0, 1]; None if undefined.

    The score is the metric if higher is better, otherwise 1 minus the metric, at least 0.
    """
    axes: dict[str, list[float | None]] = {}
    for name, metric in METRICS.items():
        estimates = [one.metrics.get(name) for one in measured]
        if not metric.on_radar or not any(estimates):
            continue
        rising = metric.better == "higher"
        scores = [None if e is None else max(0.0, e.value if rising else 1 - e.value) for e in estimates]
        best = max(score for score in scores if score is not None) or 1.0
        axes[metric.title if rising else f"1 - {metric.title}"] = [
            None if score is None else score / best for score in scores
        ]
    return axes


def _show_radar(page: Page, measured: Sequence[Measured]) -> None:
    axes = radar_scores(measured)
    if len(axes) < 3:
        return
    page.heading("At a glance")
    page.radar(
        list(axes),
        {one.name: [scores[i] for scores in axes.values()] for i, one in enumerate(measured)},
        "Further out is better. Each axis is divided by the best of these tokenizers, which lies on the rim; "
        "LPC and LPIPS enter as 1 minus their value. A gap is a metric that is not defined.",
    )


def _show_latents(page: Page, spaces: Sequence[Tokenizer], pixels: Tensor) -> None:
    page.heading("Latents")
    rows = {"image": _row(_small(pixels))}
    for space in spaces:
        z = space.encode(pixels).cpu()
        rows[space.name] = _row(pca_pictures(z - z.mean(dim=(2, 3), keepdim=True), _SIDE))
        if space.decode is not None:
            rows[f"{space.name}, decoded"] = _row(_small(space.decode(z)))
    page.rows(
        rows,
        "Latents: the first three principal components of the row's tokens as red, green and blue, after the "
        "mean of each image is taken off.",
    )


def _show_segments(
    page: Page, spaces: Sequence[Tokenizer], segmented: Segmented, config: MeasureConfig
) -> None:
    page.heading("Clusters of the tokens beside the label maps")
    chosen = spread(len(segmented.images), _SHOWN)
    pixels = to_unit(segmented.images[chosen])
    labels = _numbered(segmented.labels[chosen], segmented.ignore)
    rows = {
        "image": _row(_small(pixels)),
        "label map": _row(label_pictures(labels, _SIDE)),
    }
    for space in spaces:
        latents = space.encode(pixels).cpu()
        cells = majority_labels(labels, *latents.shape[-2:], ignore=-1)
        clusters = [_clusters(z, truth, config) for z, truth in zip(latents, cells, strict=True)]
        rows[space.name] = _row(label_pictures(torch.stack(clusters), _SIDE))
    page.rows(
        rows,
        "As many clusters as segments on the latent grid, each in the colour of the segment that it matches "
        "best, one to one. White does not count.",
    )


def _numbered(labels: Tensor, ignore: int | None) -> Tensor:
    """Labels (B, H, W) as 0, 1, ..., ignored ones as -1; the same in all images if 20 colours are enough."""
    groups = [labels] if len(torch.unique(labels)) <= 20 else [image[None] for image in labels]
    parts = []
    for group in groups:
        names = torch.unique(group)
        names = names if ignore is None else names[names != ignore]
        numbers = torch.searchsorted(names, group)
        parts.append(numbers if ignore is None else numbers.masked_fill(group == ignore, -1))
    return torch.cat(parts)


def _clusters(latent: Tensor, truth: Tensor, config: MeasureConfig) -> Tensor:
    """Clusters of a latent (C, h, w), numbered as the segments (h, w) they match best; -1 stays -1."""
    with needs("eval", "profile.html"):
        from scipy.optimize import linear_sum_assignment

    names = torch.unique(truth[truth >= 0])
    if len(names) < 2:
        return truth
    clusters = spectral_clusters(latent, len(names), sigma=config.sigma, seed=config.seed)
    overlap = [[int(((clusters == k) & (truth == n)).sum()) for n in names] for k in range(len(names))]
    _, match = linear_sum_assignment(overlap, maximize=True)
    named: Tensor = names[torch.from_numpy(match)][clusters]
    return named.masked_fill(truth < 0, -1)


def _show_moves(page: Page, spaces: Sequence[Tokenizer], pixels: Tensor, config: MeasureConfig) -> None:
    rows = {}
    for number, image in enumerate(pixels):
        for space in spaces:
            if space.decode is None:
                continue
            z = space.encode(image[None]).cpu()[0]
            u = unit_directions(z, 1, seed=config.seed, image=number)[0]
            moved = moved_latents(z, u, RADII)  # +, -, +, -, ...
            strip = torch.cat([moved[1::2].flip(0), z[None], moved[0::2]])  # from -2 to 2
            decoded = space.decode(strip).cpu()
            rows[f"{number + 1}, {space.name}"] = _row(_small(torch.cat([image[None], decoded])))
    if not rows:
        return
    steps = ", ".join(f"{radius:g}" for radius in (*(-rho for rho in reversed(RADII)), 0, *RADII))
    page.heading("Moves of the latent, decoded")
    page.rows(
        rows, f"The image, then z + rho |z| u decoded, one random direction u, rho = {steps}: LPC's moves."
    )


def _show_neighbours(
    page: Page, measured: Sequence[Measured], source: ImageSource, rows: NDArray[np.int64], size: Size
) -> None:
    several = len(np.unique(source.labels[rows])) > 1
    agreement = {True: "#2f9e6e", False: "#d4493b"} if several else {True: "#cdd1d6"}
    pictures = {}
    for number, query in enumerate(spread(len(rows), 4), start=1):
        for one in measured:
            x = F.normalize(one.pooled.double() - one.pooled.double().mean(dim=0), dim=1)
            similarity = x @ x[query]
            similarity[query] = torch.inf  # itself first
            members = rows[similarity.topk(min(_SHOWN, len(rows))).indices.numpy()]
            same = source.labels[members] == source.labels[members[0]]
            colours = ["#1c2024", *(agreement[bool(agrees)] for agrees in same[1:])]
            strip = framed(
                _small(_shown(source, members, size)),
                colours,
                width=max(2, min(*height_width(size), _SIDE) // 32),
            )
            pictures[f"{number}, {one.name}"] = _row(strip)
    page.heading("Nearest neighbours")
    page.rows(
        pictures,
        "An image (dark frame) and its nearest ones by the cosine of centred, pooled latents"
        + (", as GSQ counts them: green of the same class, red of another." if several else "."),
    )


def _show_spectrum(page: Page, measured: Sequence[Measured]) -> None:
    lines = {}
    for one in measured:
        shares = (one.spectrum / one.spectrum[0]).tolist()
        lines[one.name] = [(i / max(1, len(shares) - 1), s) for i, s in enumerate(shares) if s > 1e-6]
    page.heading("Singular values")
    page.charts({"singular value / largest": lines}, "rank, as a share of all", log=True)
    page.text("Of the pooled latents, not centred. The flatter the curve, the higher eRank.")


def _row(images: Tensor) -> Image.Image:
    return image_grid(images, len(images))


def _small(images: Tensor) -> Tensor:
    return thumbnails(images, min(_SIDE, max(images.shape[-2:])))


def _shown(source: ImageSource, rows: NDArray[np.int64], size: Size) -> Tensor:
    """These images of a source, (n, 3, H, W) in [0, 1]."""
    return next(source_batches(source, size, len(rows), rows))
