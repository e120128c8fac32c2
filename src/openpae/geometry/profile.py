"""`pae profile`: measure latent spaces over the same images, and write a record and a page."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from openpae.data.crops import Size, height_width, plain_size
from openpae.data.images import ImageSource, chosen_rows, open_images
from openpae.data.label_maps import Segmented, read_segmented
from openpae.data.scenes import render_segmented
from openpae.eval.evaluate import metric_facts
from openpae.eval.extractors import load_extractor
from openpae.eval.features import FeatureSet, features_of
from openpae.eval.generation import frechet_floor
from openpae.eval.image_stream import real_images
from openpae.geometry.measure import Measured, measure_tokenizer, work_of
from openpae.geometry.metrics import RADII
from openpae.geometry.profile_page import profile_page
from openpae.geometry.settings import MeasureConfig, ProfileRun
from openpae.interop.spaces import LatentSpace, open_tokenizer
from openpae.models.lpips import LPIPS
from openpae.models.lpips_weights import load_perceptual
from openpae.runtime.provenance import package_versions
from openpae.storage.files import fingerprint, write_json
from openpae.storage.outputs import check_outputs, made_by, make_folder


def run_profile(
    tokenizers: Sequence[str],
    run: ProfileRun,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> list[Measured]:
    """Measure tokenizers over the same images; write profile.json and profile.html.

    Args:
        tokenizers: texts of tokenizers, see `open_tokenizer`.
        run: images and settings.
        device: device of all networks.
        progress: called with (done, all).
        overwrite: replace files of these names that this command did not make.

    Returns:
        The measurements, in the order of the tokenizers.

    Raises:
        FileNotFoundError, ValueError: a tokenizer, images or label maps do not exist or do not fit; or the
            folder holds files of the user with the names of the results.
    """
    names = [run.out / "profile.json", run.out / "profile.html"]
    ours = names if made_by(names[0], kind="profile") else ()
    read = (run.images, run.label_images, run.label_maps, *map(Path, tokenizers))
    check_outputs(*names, into=run.out, inputs=read, own=ours, overwrite=overwrite)
    config = run.measure
    spaces = _opened(tokenizers, device)
    size: Size = run.size or spaces[0].image_size
    source = open_images(run.images)
    segmented = _segmented(run, size)
    lpips = load_perceptual(run.lpips, run.lpips_weights).to(device)
    real = _real_features(run, source, size, device)
    share = work_of(source, segmented, config)
    measured = [
        measure_tokenizer(
            space,
            source,
            size=size,
            segmented=segmented,
            lpips=lpips,
            real=real,
            config=config,
            tick=_ticks(progress, number * share, len(spaces) * share),
        )
        for number, space in enumerate(spaces)
    ]
    facts = _facts(source, size, segmented, lpips, run.lpips, real, config)
    records = [
        _record(one, space.kind, text) for one, space, text in zip(measured, spaces, tokenizers, strict=True)
    ]
    make_folder(run.out)
    write_json(run.out / "profile.json", {**facts, "tokenizers": records})
    page = profile_page(measured, spaces, source, size, segmented, facts, config)
    page.write(run.out / "profile.html")
    return measured


def _segmented(run: ProfileRun, size: Size) -> Segmented | None:
    if run.label_maps is not None:
        images = run.label_images or run.images
        return read_segmented(images, run.label_maps, size=size, count=run.label_count, ignore=run.ignore)
    if not run.scenes:
        return None
    height, width = height_width(size)
    if height != width:
        raise ValueError(f"scenes are square, but the images have {height} x {width} pixels; give size")
    return render_segmented(run.scenes, size=height, seed=run.measure.seed)


def _real_features(
    run: ProfileRun, source: ImageSource, size: Size, device: torch.device | str
) -> FeatureSet | None:
    if run.extractor == "none":
        return None
    extractor = load_extractor(run.extractor, run.extractor_weights, device)
    rows = chosen_rows(source, run.measure.count)
    return features_of(real_images(source, size, rows=rows), extractor, run.measure.batch_size)


def _opened(tokenizers: Sequence[str], device: torch.device | str) -> list[LatentSpace]:
    """Open all tokenizers. Equal names become the texts, which differ."""
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
    size: Size,
    segmented: Segmented | None,
    lpips: LPIPS,
    network: str,
    real: FeatureSet | None,
    config: MeasureConfig,
) -> dict[str, Any]:
    """Everything that the numbers depend on, except the tokenizers."""
    facts: dict[str, Any] = {
        "kind": "profile",
        "images": {
            "fingerprint": source.fingerprint(),
            "known": len(source),
            "measured": len(chosen_rows(source, config.count)),
        },
        "image_size": plain_size(size),
        "label_maps": None,
        "settings": dataclasses.asdict(config) | {"radii": list(RADII)},
        "lpips": {"network": network, "weights": fingerprint(lpips.state_dict())},
        "extractor": None,
        "versions": package_versions(),
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
        "metrics": metric_facts(measured.metrics),
        "undefined": measured.undefined,
        "singular_values": measured.spectrum.tolist(),
    }
