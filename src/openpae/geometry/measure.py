"""Measure a latent space: every metric of a tokenizer over the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openpae.data.crops import Size
from openpae.data.images import ImageSource, chosen_rows, spread
from openpae.data.label_maps import Segmented
from openpae.data.pixels import to_unit
from openpae.eval.estimate import Estimate, Settings, Undefined, split_results
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import frechet_distance
from openpae.eval.image_stream import source_batches
from openpae.eval.reconstruction import ReconstructionMetrics
from openpae.geometry.interpolation import interpolated_frechet
from openpae.geometry.metrics import (
    Decode,
    effective_rank,
    global_semantic_quality,
    latent_perturbation_consistency,
    majority_labels,
    singular_values,
    spatial_structure_consistency,
)
from openpae.geometry.proxies import (
    latent_neighbour_consistency,
    region_self_similarity,
    spectral_energy_concentration,
    velocity_irreducible_variance,
)
from openpae.geometry.settings import MeasureConfig
from openpae.interop.spaces import Tokenizer, check_tokenizer
from openpae.models.lpips import LPIPS

METRIC_NAMES = (
    "ssc", "lpc", "gsq", "erank", "viv", "sec", "lnc", "srss", "psnr", "ssim", "lpips", "frechet",
    "interpolated_frechet",
)  # fmt: skip
"""In display order."""

Tick = Callable[[int], None]
"""Called with the number of images done since the last call."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurement of one tokenizer."""

    name: str
    fingerprint: str
    latent_shape: tuple[int, int, int]
    metrics: dict[str, Estimate]
    """Estimates of the defined metrics of `METRIC_NAMES`."""
    undefined: dict[str, str]
    """Missing metric -> reason."""
    pooled: Tensor
    """Latents averaged over the grid, in the order of the images, (n, C)."""
    spectrum: Tensor
    """Singular values of `pooled`, largest first."""


def measure_tokenizer(
    tokenizer: Tokenizer,
    source: ImageSource,
    *,
    size: Size,
    segmented: Segmented | None = None,
    lpips: LPIPS | None = None,
    real: FeatureSet | None = None,
    config: MeasureConfig | None = None,
    tick: Tick | None = None,
) -> Measured:
    """Compute every metric that is defined for a tokenizer and these images.

    Args:
        tokenizer: any tokenizer.
        source: images, centre-cropped to `size`, with the classes of GSQ.
        size: (H, W) in pixels, or the side of squares.
        segmented: images with label maps, of the same size, for SSC; None leaves it out.
        lpips: network of LPC and LPIPS, on the tokenizer's device; None leaves these out.
        real: features of these images (`chosen_rows`), for Frechet distances; None leaves these out.
        config: settings.
        tick: progress; the calls of one tokenizer add up to `work_of`.

    Raises:
        ValueError: the tokenizer breaks its protocol for images of this size (`check_tokenizer`).
    """
    config = config or MeasureConfig()
    tick = tick or (lambda _: None)
    rows = chosen_rows(source, config.count)
    results, pooled, latents = _reconstruct(tokenizer, source, rows, size, lpips, real, config, tick)
    labels = torch.from_numpy(source.labels[rows])
    results += [effective_rank(pooled), _semantics(pooled, labels, config)]
    results += [velocity_irreducible_variance(latents, labels), latent_neighbour_consistency(latents, labels)]
    results += [spectral_energy_concentration(latents), *_structure(tokenizer, segmented, config)]
    tick(0 if segmented is None else len(segmented.images))
    if tokenizer.decode is None:
        missing = ("lpc", "psnr", "ssim", "lpips", "frechet", "interpolated_frechet")
        reason = f"{tokenizer.name} has no decoder, so there are no images to compare"
        results += [Undefined(name, reason) for name in missing]
    else:
        results += _continuity(latents, tokenizer.decode, lpips, real, config)
    tick(min(config.lpc_count, len(rows)))
    metrics, undefined = split_results(results)
    return Measured(
        name=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        latent_shape=tokenizer.latent_shape(size),
        metrics={name: metrics[name] for name in METRIC_NAMES if name in metrics},
        undefined={name: undefined[name] for name in METRIC_NAMES if name in undefined},
        pooled=pooled,
        spectrum=singular_values(pooled),
    )


def work_of(source: ImageSource, segmented: Segmented | None, config: MeasureConfig) -> int:
    """The sum of the ticks of one tokenizer."""
    images = min(config.count, len(source))
    return images + min(config.lpc_count, images) + (0 if segmented is None else len(segmented.images))


@torch.no_grad()
def _reconstruct(
    tokenizer: Tokenizer,
    source: ImageSource,
    rows: NDArray[np.int64],
    size: Size,
    lpips: LPIPS | None,
    real: FeatureSet | None,
    config: MeasureConfig,
    tick: Tick,
) -> tuple[list[Estimate | Undefined], Tensor, Tensor]:
    """Metrics of reconstructions, pooled latents (n, C), and latents (n, C, h, w)."""
    decode = tokenizer.decode
    pairs = ReconstructionMetrics(lpips)
    decoded = None if real is None else FeatureSet(real.extractor)
    pooled, latents = [], []
    for number, x in enumerate(source_batches(source, size, config.batch_size, rows)):
        if number == 0:
            check_tokenizer(tokenizer, x[:2])
        z = tokenizer.encode(x)
        pooled.append(z.float().mean(dim=(2, 3)).cpu())
        latents.append(z.float().cpu())
        if decode is not None:
            y = decode(z)
            pairs.update(x.to(y.device), y)
            if decoded is not None:
                decoded.update(y.cpu())
        tick(len(x))
    results: list[Estimate | Undefined] = [] if decode is None else [*pairs.compute().values()]
    if decode is not None and decoded is not None and real is not None:
        distance = frechet_distance(decoded.pooled.gaussian(), real.pooled.gaussian())
        settings: Settings = {"extractor": real.extractor.name, "reference": real.n}
        results.append(Estimate(name="frechet", value=distance, n=decoded.n, settings=settings))
    return results, torch.cat(pooled), torch.cat(latents)


def _semantics(pooled: Tensor, labels: Tensor, config: MeasureConfig) -> Estimate | Undefined:
    if len(torch.unique(labels)) < 2:
        return Undefined("gsq", "the images are all of one class; give a folder with one subfolder per class")
    return global_semantic_quality(
        pooled, labels, classes=config.classes, repeats=config.repeats, seed=config.seed
    )


def _continuity(
    latents: Tensor, decode: Decode, lpips: LPIPS | None, real: FeatureSet | None, config: MeasureConfig
) -> Iterator[Estimate | Undefined]:
    if lpips is None:
        yield from (Undefined(name, "no LPIPS network was given") for name in ("lpc", "lpips"))
    else:
        yield latent_perturbation_consistency(
            latents[spread(len(latents), config.lpc_count)],
            decode,
            lpips,
            directions=config.directions,
            batch_size=config.batch_size,
            seed=config.seed,
        )
    if real is None:
        names = ("frechet", "interpolated_frechet")
        yield from (Undefined(name, "no feature extractor was given") for name in names)
    else:
        yield interpolated_frechet(latents, decode, real, batch_size=config.batch_size, seed=config.seed)


@torch.no_grad()
def _structure(
    tokenizer: Tokenizer, segmented: Segmented | None, config: MeasureConfig
) -> list[Estimate | Undefined]:
    """SSC and SRSS."""
    if segmented is None:
        return [Undefined(name, "no label maps were given") for name in ("ssc", "srss")]
    latents = torch.cat(
        [tokenizer.encode(to_unit(x)).cpu() for x in torch.split(segmented.images, config.batch_size)]
    )
    maps, ignore = segmented.labels, segmented.ignore
    grid = majority_labels(maps, *latents.shape[-2:], ignore=ignore)
    if all(len(torch.unique(cells[cells != ignore])) < 2 for cells in grid):
        h, w = grid.shape[1:]
        reason = f"no label map has two segments on the {h} x {w} latent grid"
        return [Undefined(name, reason) for name in ("ssc", "srss")]
    return [
        spatial_structure_consistency(latents, maps, sigma=config.sigma, ignore=ignore, seed=config.seed),
        region_self_similarity(latents, maps, ignore=ignore),
    ]
