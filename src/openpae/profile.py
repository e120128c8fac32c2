"""`pae profile`: measure latent spaces over the same images; write a record and a page that compares them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from openpae.critics import LPIPS, load_perceptual
from openpae.data.images import ImageSource, open_images
from openpae.data.label_maps import Segmented, read_segmented, render_segmented
from openpae.eval.adapters import LatentSpace, open_tokenizer
from openpae.eval.fid import frechet_floor
from openpae.eval.geometry import RADII
from openpae.eval.measure import (
    MeasureConfig,
    Measured,
    chosen_rows,
    features_of,
    measure_tokenizer,
    work_of,
)
from openpae.eval.records import ExtractorName, load_extractor
from openpae.eval.reference import FeatureSet
from openpae.profile_page import profile_page
from openpae.storage import fingerprint, write_json


def run_profile(
    tokenizers: Sequence[str],
    images: Path,
    out: Path,
    *,
    label_maps: Path | None = None,
    label_images: Path | None = None,
    label_count: int = 500,
    ignore: int | None = None,
    scenes: int = 0,
    size: int | None = None,
    lpips: Literal["vgg", "alex", "random"] = "vgg",
    lpips_weights: str | Path | None = None,
    extractor: ExtractorName | Literal["none"] = "vgg16",
    config: MeasureConfig | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Measure tokenizers over the same images; write profile.json and profile.html.

    Args:
        tokenizers: texts that `open_tokenizer` understands.
        images: a folder of images, best with one subfolder per class, or packed images.
        out: folder for the two files.
        label_maps: index PNGs or a COCO panoptic JSON, for SSC (`read_segmented`).
        label_images: the images of these maps; None takes `images`.
        label_count: images with label maps to take, evenly spread.
        ignore: label that does not count.
        scenes: take so many rendered OpenMoji scenes with exact label maps instead.
        size: side in pixels to which all images are brought; None takes the first tokenizer's own.
        lpips: network of LPIPS.
        lpips_weights: where its weights are; see `critics.load_lpips`.
        extractor: features of the Frechet distances; "none" leaves them out.
        config: settings of the metrics.
        device: where to compute.
        progress: called with (done, all).

    Returns:
        What was measured, in the order of the tokenizers.

    Raises:
        FileNotFoundError, ValueError: a tokenizer, images or maps that can not be had or do not fit.
    """
    if scenes and label_maps is not None:
        raise ValueError("scenes are rendered with their own label maps; give either label_maps or scenes")
    if label_maps is None and (label_images is not None or ignore is not None):
        raise ValueError("label_images and ignore say something about label_maps, which were not given")
    config = config or MeasureConfig()
    spaces = _opened(tokenizers, device)
    size = size or spaces[0].image_size
    source = open_images(images)
    segmented = None
    if label_maps is not None:
        segmented = read_segmented(
            label_images or images, label_maps, size=size, count=label_count, ignore=ignore
        )
    elif scenes:
        segmented = render_segmented(scenes, size=size, seed=config.seed)
    judge = load_perceptual(lpips, lpips_weights).to(device)
    real = None if extractor == "none" else features_of(source, size, load_extractor(extractor), config)
    share = work_of(source, segmented, config)
    found = [
        measure_tokenizer(
            space,
            source,
            size=size,
            segmented=segmented,
            lpips=judge,
            real=real,
            config=config,
            tick=_ticks(progress, number * share, len(spaces) * share),
        )
        for number, space in enumerate(spaces)
    ]
    facts = _facts(source, size, segmented, judge, lpips, real, config)
    records = [
        _record(*each) for each in zip(found, [space.kind for space in spaces], tokenizers, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "profile.json", {**facts, "tokenizers": records})
    page = profile_page(found, spaces, source, size, segmented, facts, config)
    page.write(out / "profile.html")
    return found


def _opened(tokenizers: Sequence[str], device: torch.device | str) -> list[LatentSpace]:
    """All of them, each under a name of its own."""
    if not tokenizers:
        raise ValueError("profile needs at least one tokenizer")
    if twice := [text for text, times in Counter(tokenizers).items() if times > 1]:
        raise ValueError(f"tokenizers must differ, got {twice[0]!r} more than once")
    spaces = [open_tokenizer(text, device) for text in tokenizers]
    times = Counter(space.name for space in spaces)
    return [
        space if times[space.name] == 1 else dataclasses.replace(space, name=text)
        for space, text in zip(spaces, tokenizers, strict=True)
    ]


def _ticks(progress: Callable[[int, int], None] | None, done: int, total: int) -> Callable[[int], None]:
    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, total)

    return tick


def _facts(
    source: ImageSource,
    size: int,
    segmented: Segmented | None,
    judge: LPIPS,
    lpips: str,
    real: FeatureSet | None,
    config: MeasureConfig,
) -> dict[str, Any]:
    """Everything that the numbers depend on, but for the tokenizers."""
    packages = ["openpae", "torch", "numpy", "pillow", "scipy", "scikit-learn"]
    if importlib.util.find_spec("diffusers"):
        packages.append("diffusers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    facts: dict[str, Any] = {
        "kind": "profile",
        "images": {
            "fingerprint": source.fingerprint(),
            "known": len(source),
            "measured": len(chosen_rows(source, config.count)),
        },
        "image_size": size,
        "label_maps": None,
        "settings": dataclasses.asdict(config) | {"radii": list(RADII)},
        "lpips": {"network": lpips, "weights": fingerprint(judge.state_dict())},
        "extractor": None,
        "versions": versions | {"python": platform.python_version()},
    }
    if segmented is not None:
        facts["label_maps"] = {
            "name": segmented.name,
            "fingerprint": segmented.fingerprint(),
            "images": len(segmented.images),
            "ignore": segmented.ignore,
        }
    if real is not None:
        facts["extractor"] = {"name": real.extractor.name, "weights": real.extractor.weights}
        if real.n >= 4:
            facts["frechet_floor"] = dataclasses.asdict(frechet_floor(real.features(), real.n // 2))
    return facts


def _record(measured: Measured, kind: str, text: str) -> dict[str, Any]:
    return {
        "tokenizer": text,
        "name": measured.name,
        "kind": kind,
        "fingerprint": measured.fingerprint,
        "latent_shape": list(measured.latent_shape),
        "metrics": {name: dataclasses.asdict(estimate) for name, estimate in measured.metrics.items()},
        "undefined": measured.undefined,
        "singular_values": measured.spectrum.tolist(),
    }
