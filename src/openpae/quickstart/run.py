"""`pae quickstart`: all stages, from emoji to generated emoji, in a few CPU minutes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from openpae import config as configs
from openpae.data.caches import cache_latents
from openpae.data.images import PackedImages
from openpae.data.openmoji import CATEGORIES, emoji_catalog, pack_pictures, split_catalog
from openpae.data.pixels import quantize
from openpae.eval.evaluate import evaluate_reconstruction, evaluate_samples
from openpae.eval.extractors import load_extractor
from openpae.eval.features import FeatureSet, features_of
from openpae.eval.image_stream import real_images, tensor_images
from openpae.eval.reference import reference_of
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import check_pair, load_generator, load_tokenizer
from openpae.models.tokenizer import Autoencoder
from openpae.objective.settings import TokenizerLoss
from openpae.quickstart import plans
from openpae.quickstart.page import Result, pretrained_report, quickstart_report
from openpae.quickstart.verdict import advice, baseline_frechet, baseline_psnr, problems, recognised
from openpae.quickstart.workers import Workers, run_in, time_workers
from openpae.runtime.extras import require
from openpae.runtime.terminal import Progress, note
from openpae.sampling.guidance import VelocityModel
from openpae.sampling.pipeline import Pipeline
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import atomic_file, read_json, write_json
from openpae.storage.model_folder import PARTS, identity_of
from openpae.storage.outputs import check_outputs, locked
from openpae.storage.pairs import PACKAGED
from openpae.train.generator import train_generator
from openpae.train.refiner import train_refiner
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import train_tokenizer

Run = TypeVar("Run", RefinerRun, TokenizerRun, GeneratorRun)

SAMPLER = SamplerConfig(solver="adams", steps=20, shift=0.4, guidance=2.0, guidance_start=0.1)
"""Sampler of the quickstart, nearer to the path than 40 Euler steps in half of their time."""

PRETRAINED = PACKAGED / "openmoji-pae"
"""The pretrained tokenizer and generator of 64-pixel emoji, from tools/make_pretrained.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a quickstart."""

    report: Path
    """Path of the HTML report."""
    verdict: str = ""
    """One line with the reason and the advice if the result is not usable; else empty."""


PACKAGES = ("resvg_py", "efficientnet_lite_pytorch", "pooch", "scipy", "sklearn", "matplotlib")
"""Packages that the quickstart uses; it looks for all of them before it trains."""


def run_quickstart(
    out: Path, budget: float, *, seed: int = 0, limit: int | None = None, strict: bool = False
) -> Outcome:
    """Render emoji, train tokenizer and generator, sample, measure and write the report.

    Each stage writes its result into `out` and is skipped if that is complete, so an interrupted quickstart
    resumes. Training stops by time: see `LoopConfig.seconds`.

    Args:
        out: folder for all results.
        budget: total time in seconds; the time that preparation leaves goes to training.
        seed: seed of weights, data order, noise and rendering.
        limit: number of training and of held-out emoji, for a trial; None uses all.
        strict: raise if the budget is too short for the fewest steps; by default it is extended.

    Raises:
        ValueError: the folder holds another quickstart, another process runs one there, or `strict` is set
            and the budget is too short.
    """
    require("quickstart", "pae quickstart", *PACKAGES)
    clock = _Clock(out, budget)
    _same_plan(out, {"budget": budget, "seed": seed, "limit": limit})
    with locked(out, "running a quickstart"):
        return _run_stages(out, clock, budget, seed=seed, limit=limit, strict=strict)


def _run_stages(
    out: Path, clock: _Clock, budget: float, *, seed: int, limit: int | None, strict: bool
) -> Outcome:
    """The stages of `run_quickstart`."""
    train, held_out = (side[:limit] for side in split_catalog(emoji_catalog()))
    pictures = max(1, min(8, round(budget / 240)))
    with clock.stage("render emoji"):
        pack_pictures(out / "data" / "train", train, size=64, pictures=pictures, seed=seed)
        shown = pack_pictures(out / "data" / "held-out", held_out, size=64, pictures=2, seed=seed + 1)
    with clock.stage("time the machine"):
        workers = _timed(out, clock, seed, strict=strict, trial=limit is not None)
    with clock.stage("train refiner"):
        refiner = _planned(out, "refiner", clock, plans.refiner_run(out, seed), trial=limit is not None)
        run_in(workers, _train_refiner, refiner, out / "refiner")
    with clock.stage("train tokenizer"):
        tokenizer = _planned(out, "tokenizer", clock, plans.tokenizer_run(out, seed), trial=limit is not None)
        run_in(workers, train_tokenizer, tokenizer, out / "tokenizer")
    with clock.stage("cache latents"):
        run_in(workers, _cache_all, out)
    with clock.stage("train generator"):
        generator = _planned(out, "generator", clock, plans.generator_run(out, seed), trial=limit is not None)
        run_in(workers, train_generator, generator, out / "generator")
    with clock.stage("sample and measure"):
        trained = load_tokenizer(out / "tokenizer")
        record, samples, labels = _measure(out, trained, shown, budget, seed)
    reasons = problems(record)
    verdict = advice(reasons, clock.budget) if reasons else ""
    result = Result(
        out=out,
        seconds=clock.seconds,
        tokenizer=trained,
        held_out=shown,
        record=record,
        samples=samples,
        labels=labels,
        sampler=SAMPLER,
    )
    return Outcome(report=quickstart_report(result, verdict), verdict=verdict)


def cache_pictures(out: Path, pictures: Mapping[str, PackedImages]) -> Autoencoder:
    """Cache latents of pictures in out/latents; return the tokenizer, which is read from out/tokenizer."""
    tokenizer = load_tokenizer(out / "tokenizer")
    for name, source in pictures.items():
        with Progress("  encoding", "img") as progress:
            cache_latents(
                tokenizer.encode,
                source,
                out / "latents" / name,
                image_size=tokenizer.config.image_shape,
                latent_shape=tokenizer.config.latent_shape,
                tokenizer_fingerprint=identity_of(out / "tokenizer").fingerprint,
                flips=False,  # the renderer mirrors emoji, except letters and flags
                progress=progress,
            )
    return tokenizer


def show_pretrained(out: Path, *, folder: Path = PRETRAINED, seed: int = 0, limit: int | None = None) -> Path:
    """Reconstruct held-out emoji and draw samples with pretrained models, and write a report.

    Args:
        out: folder for all results; existing pictures are not rendered again.
        folder: pretrained models, in the subfolders tokenizer and generator.
        seed: seed of the noise and of the backgrounds.
        limit: number of held-out emoji, for a trial; None uses all.

    Returns:
        Path of the HTML report.

    Raises:
        FileNotFoundError: the folder holds no pretrained models.
        ValueError: `out` holds the result of another quickstart.
    """
    pipeline = Pipeline.from_pretrained(folder, decode_only=False)
    facts = check_pair(*(folder / part for part in PARTS))
    clock = _Clock(out, math.inf)
    clock.seconds.clear()  # only the time of this call counts
    _same_plan(out, {"pretrained": facts["generator"], "seed": seed, "limit": limit})
    emojis = split_catalog(emoji_catalog())[1][:limit]
    with clock.stage("render emoji"):
        shown = pack_pictures(out / "data" / "held-out", emojis, size=64, pictures=2, seed=seed + 1)
    tokenizer = pipeline.tokenizer
    assert isinstance(tokenizer, Autoencoder)  # check_pair has refused other kinds
    with clock.stage("reconstruct"):
        stream = real_images(shown, 64, name="held-out emoji")
        record = {
            "reconstruction": evaluate_reconstruction(
                tokenizer, stream, extractor=None, lpips=None, batch_size=64
            ),
            "free": {"psnr": baseline_psnr(shown, tokenizer.config.decoder.patch_size)},
            "recognised": recognised(tokenizer, shown, TokenizerLoss().mcr_angles),
        }
        write_json(out / "evaluation.json", record)
    with clock.stage("sample"):
        labels = balanced_labels(6 * len(CATEGORIES), len(CATEGORIES))
        samples = _sampled(tokenizer, pipeline.generator, labels, seed, batch_size=36)
    result = Result(
        out=out,
        seconds=clock.seconds,
        tokenizer=tokenizer,
        held_out=shown,
        record=record,
        samples=samples,
        labels=labels,
        sampler=SAMPLER,
    )
    return pretrained_report(result, folder)


def _same_plan(out: Path, plan: dict[str, Any]) -> None:
    """Save the plan, or raise a ValueError if the folder holds another budget, seed or limit."""
    file = out / "plan.json"
    if not file.is_file():
        check_outputs(*(out / name for name in _WRITTEN))
        write_json(file, plan)
    elif (begun := read_json(file)) != plan:
        shown = ", ".join(f"{name} {begun.get(name)}" for name in plan if begun.get(name) != plan[name])
        raise ValueError(f"{out} holds a quickstart with {shown}; go on with that, or name another --out")


_WRITTEN = (
    *("data", "generator", "latents", "refiner", "tokenizer", "evaluation.json", "report.html"),
    *("reconstructions.png", "samples.npz", "samples.png"),
)
"""Files and folders of a quickstart beside its plan.json."""


class _Clock:
    """Seconds per stage, saved in stages.json."""

    def __init__(self, out: Path, budget: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file, self.budget = out / "stages.json", budget
        self.seconds: dict[str, float] = read_json(self.file) if self.file.is_file() else {}
        self.name, self.start = "", 0.0

    def stage(self, name: str) -> _Clock:
        """Enter a context whose time counts for this stage."""
        self.name = name
        return self

    def __enter__(self) -> None:
        note(f"[{sum(self.seconds.values()):5.0f} s] {self.name}")
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        passed = time.perf_counter() - self.start
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + passed
        write_json(self.file, self.seconds)

    def left(self) -> float:
        """Return the seconds of the budget that remain, in the middle of a stage."""
        return self.budget - sum(self.seconds.values()) - (time.perf_counter() - self.start)


def _timed(out: Path, clock: _Clock, seed: int, *, strict: bool, trial: bool) -> Workers:
    """Choose the workers and the total time, or read the earlier choice."""
    file = out / "timing.json"
    timing = plans.read_timing(file)
    if timing is None and trial:
        return Workers(threads=torch.get_num_threads())
    if timing is None:
        speeds = time_workers(plans.tokenizer_run(out, seed), plans.generator_run(out, seed))
        spent = clock.budget - clock.left()
        timing, lines = plans.settle(speeds, clock.budget, spent=spent, strict=strict)
        for line in lines:
            note(f"  {line}")
        plans.write_timing(file, timing, speeds)
    clock.budget = timing.seconds
    return timing.workers


def _planned(out: Path, name: str, clock: _Clock, run: Run, *, trial: bool) -> Run:
    """Read the config in the stage's folder, or give this one its share of the time left."""
    file = out / name / "config.yaml"
    if file.is_file():
        return configs.load(type(run), file)
    left = clock.left() - 20 - 0.1 * clock.budget  # minus the time of sampling, metrics and report
    return plans.timed(run, name, max(10.0, left), trial=trial)


def _train_refiner(run: RefinerRun, run_dir: Path) -> None:
    with Progress("  VFM features", "img") as progress:
        train_refiner(run, run_dir, progress=progress)


def _cache_all(out: Path) -> None:
    cache_pictures(out, {name: PackedImages(out / "data" / name) for name in ("train", "held-out")})


def _measure(
    out: Path, tokenizer: Autoencoder, held_out: PackedImages, budget: float, seed: int
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return metrics of reconstructions, samples and baselines, and the samples with their labels.

    They are saved in evaluation.json and samples.npz.
    """
    count = max(108, min(1800, int(budget / 2) // 9 * 9))
    labels = balanced_labels(count, len(CATEGORIES))
    samples = _sampled(tokenizer, load_generator(out / "generator"), labels, seed, batch_size=60)
    with atomic_file(out / "samples.npz") as partial, partial.open("wb") as file:
        np.savez(file, quantize(samples).permute(0, 2, 3, 1).numpy(), labels.numpy())
    extractor = load_extractor("vgg16")  # not the encoder's own features: that would be circular
    train = PackedImages(out / "data" / "train")
    chosen = np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(int)
    real = real_images(train, 64, name="emoji of the training set", rows=chosen.tolist())
    reference = reference_of(features_of(real, extractor, 64), real.name, real.preprocessing)
    facts = check_pair(out / "tokenizer", out / "generator")
    pixels = train.shards.gather(chosen).float() / 255
    angles = configs.load(TokenizerRun, out / "tokenizer" / "config.yaml").loss.mcr_angles
    record = {
        "reconstruction": evaluate_reconstruction(
            tokenizer,
            real_images(held_out, 64, name="held-out emoji"),
            extractor=extractor,
            lpips=load_perceptual("vgg"),
            batch_size=64,
            min_samples=2,
        ),
        "samples": evaluate_samples(
            tensor_images(samples, facts={"seed": seed, **configs.to_dict(SAMPLER), **facts}),
            reference,
            extractor=extractor,
            batch_size=64,
            min_samples=2,  # the page shows the floor at this count beside the distance
        ),
        "free": {
            "psnr": baseline_psnr(held_out, tokenizer.config.decoder.patch_size),
            "frechet": baseline_frechet(pixels, FeatureSet(extractor), reference),
        },
        "recognised": recognised(tokenizer, held_out, angles),
    }
    write_json(out / "evaluation.json", record)
    return record, samples, labels


def _sampled(
    tokenizer: Autoencoder, generator: VelocityModel, labels: torch.Tensor, seed: int, *, batch_size: int
) -> torch.Tensor:
    """Draw an image for each label, (n, 3, 64, 64) in [0, 1]."""
    batches: list[torch.Tensor] = []
    drawn = sample_images(tokenizer, generator, labels, SAMPLER, seed=seed, batch_size=batch_size)
    with Progress("  sampling", "img") as show:
        for images in drawn:
            batches.append(images)
            show(sum(map(len, batches)), len(labels))
    return torch.cat(batches)
