"""`pae quickstart`: the whole line, from emoji to generated emoji, in one command and a few CPU minutes."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from openpae import config as configs
from openpae.data.caches import cache_latents
from openpae.data.images import PackedImages
from openpae.data.openmoji import CATEGORIES, emoji_catalog, pack_pictures, split_catalog
from openpae.data.pixels import quantize
from openpae.engine.loop import seconds_per_step
from openpae.engine.settings import LoopConfig
from openpae.eval.evaluate import evaluate_reconstruction, evaluate_samples
from openpae.eval.extractors import load_extractor
from openpae.eval.features import features_of
from openpae.eval.image_stream import real_images, tensor_images
from openpae.eval.reference import reference_of
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import check_pair, load_generator, load_tokenizer
from openpae.models.tokenizer import Autoencoder
from openpae.quickstart.page import pretrained_report, quickstart_report
from openpae.sampling.pipeline import Pipeline
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import read_json, whole_file, write_json
from openpae.storage.model_folder import PARTS, identity_of
from openpae.storage.outputs import spare
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.refiner import RefinerTask, train_refiner
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask, train_tokenizer

T = TypeVar("T")

SAMPLER = SamplerConfig(steps=40, shift=0.4, guidance=2.0, guidance_start=0.1)
"""How the quickstart samples: few steps, because its generator is as small as its latents."""


PRETRAINED = Path(__file__).parent.parent / "pretrained" / "openmoji"
"""The pretrained release: a pair for 64-pixel emoji, trained by tools/make_pretrained.py."""


def parse_budget(text: str) -> float:
    """Seconds of a duration such as "200s", "12min" or "2h".

    Raises:
        ValueError: not such a text, or less than three minutes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h)", text.strip())
    if not match:
        raise ValueError(f"budget must be a number and s, min or h (12min, 2h), got {text!r}")
    seconds = float(match[1]) * {"s": 1, "min": 60, "m": 60, "h": 3600}[match[2]]
    if seconds < 180:
        raise ValueError(
            f"budget must be at least 3min, got {text!r}; preparing and measuring alone take half of that"
        )
    return seconds


def run_quickstart(out: Path, budget: float, *, seed: int = 0, limit: int | None = None) -> Path:
    """Render emoji, train tokenizer and generator, sample, measure, report.

    Every stage leaves its result in `out` and is skipped when that is complete, so the same command goes on
    after any interruption. The number of training steps is fitted to the budget once, by timing a few, and
    then stands in the runs' config.yaml.

    Args:
        out: folder for everything.
        budget: seconds for all of it. What is left after the preparation goes to training.
        seed: of weights, data order, noise and rendering.
        limit: emoji to use on either side of the split, for a trial; None uses all.

    Returns:
        The report, an HTML file.
    """
    clock = _Clock(out, budget)
    _same_plan(out, {"budget": budget, "seed": seed, "limit": limit})
    train, held_out = (side[:limit] for side in split_catalog(emoji_catalog()))
    pictures = max(1, min(8, round(budget / 240)))
    with clock.stage("render emoji"):
        images = pack_pictures(out / "data" / "train", train, size=64, pictures=pictures, seed=seed)
        judged = pack_pictures(out / "data" / "held-out", held_out, size=64, pictures=2, seed=seed + 1)

    with clock.stage("train refiner"):
        run_dir = out / "refiner"
        train_refiner(_planned(RefinerRun, run_dir, lambda: _plan_refiner(out, clock, seed)), run_dir)

    with clock.stage("train tokenizer"):
        run_dir = out / "tokenizer"
        run = _planned(TokenizerRun, run_dir, lambda: _plan_tokenizer(out, clock, seed))
        train_tokenizer(run, run_dir)
    with clock.stage("cache latents"):
        tokenizer = cache_pictures(out, {"train": images, "held-out": judged})

    with clock.stage("train generator"):
        run_dir = out / "generator"
        train_generator(_planned(GeneratorRun, run_dir, lambda: _plan_generator(out, clock, seed)), run_dir)

    with clock.stage("sample and measure"):
        record, samples, labels = _measure(out, tokenizer, judged, budget, seed)
    return quickstart_report(out, clock.seconds, tokenizer, judged, record, samples, labels, SAMPLER)


def cache_pictures(out: Path, pictures: Mapping[str, PackedImages]) -> Autoencoder:
    """Cache the latents of pictures in out/latents by the tokenizer of out/tokenizer, which is returned."""
    tokenizer = load_tokenizer(out / "tokenizer")
    for name, source in pictures.items():
        cache_latents(
            tokenizer.encode,
            source,
            out / "latents" / name,
            image_size=tokenizer.config.image_shape,
            latent_shape=tokenizer.config.latent_shape,
            tokenizer_fingerprint=identity_of(out / "tokenizer").fingerprint,
            flips=False,  # letters and flags do not mirror; the renderer has mirrored what may be
            progress=_line("encoding"),
        )
    return tokenizer


def show_pretrained(out: Path, *, folder: Path = PRETRAINED, seed: int = 0, limit: int | None = None) -> Path:
    """What a pretrained pair does: held-out emoji and their reconstructions, samples, a report.

    Args:
        out: folder for everything; pictures that are there are not rendered again.
        folder: the pair, with the subfolders tokenizer and generator.
        seed: of the noise and of the backgrounds.
        limit: held-out emoji to use, for a trial; None uses all.

    Returns:
        The report, an HTML file.

    Raises:
        FileNotFoundError: no pair in the folder.
        ValueError: `out` holds the result of another quickstart.
    """
    pipeline = Pipeline.from_pretrained(folder, decode_only=False)
    facts = check_pair(*(folder / part for part in PARTS))
    clock = _Clock(out, math.inf)
    clock.seconds.clear()  # nothing goes on from an earlier call: only this one's time counts
    _same_plan(out, {"pretrained": facts["generator"], "seed": seed, "limit": limit})
    emojis = split_catalog(emoji_catalog())[1][:limit]
    with clock.stage("render emoji"):
        judged = pack_pictures(out / "data" / "held-out", emojis, size=64, pictures=2, seed=seed + 1)
    with clock.stage("reconstruct"):
        record = evaluate_reconstruction(
            pipeline.tokenizer,
            real_images(judged, 64, name="held-out emoji"),
            extractor=None,
            lpips=None,
            batch_size=64,
        )
        write_json(out / "evaluation.json", record)
    with clock.stage("sample"):
        labels = balanced_labels(12 * len(CATEGORIES), len(CATEGORIES))
        samples, show = [], _line("sampling")
        for images in sample_images(
            pipeline.tokenizer, pipeline.generator, labels, SAMPLER, seed=seed, batch_size=36
        ):
            samples.append(images)
            show(sum(map(len, samples)), len(labels))
    return pretrained_report(
        out, folder, clock.seconds, pipeline.tokenizer, judged, record, torch.cat(samples), labels, SAMPLER
    )


def _same_plan(out: Path, plan: dict[str, Any]) -> None:
    """Keep what was asked for, or see that it is the same.

    Raises:
        ValueError: the folder holds a quickstart with another budget, seed or limit.
    """
    file = out / "plan.json"
    if not file.is_file():
        spare(*(out / name for name in _WRITTEN))
        write_json(file, plan)
    elif (begun := read_json(file)) != plan:
        shown = ", ".join(f"{name} {begun.get(name)}" for name in plan if begun.get(name) != plan[name])
        raise ValueError(f"{out} holds a quickstart with {shown}; go on with that, or name another --out")


_WRITTEN = (
    *("data", "generator", "latents", "refiner", "tokenizer", "evaluation.json", "report.html"),
    *("reconstructions.png", "samples.npz", "samples.png"),
)
"""What a quickstart makes beside its plan.json, without which none of it is a quickstart's."""


class _Clock:
    """Time per stage, kept in stages.json over interruptions."""

    def __init__(self, out: Path, budget: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file, self.budget = out / "stages.json", budget
        self.seconds: dict[str, float] = read_json(self.file) if self.file.is_file() else {}
        self.name, self.start = "", 0.0

    def stage(self, name: str) -> _Clock:
        """A block whose time counts for this stage."""
        self.name = name
        return self

    def __enter__(self) -> None:
        print(f"[{sum(self.seconds.values()):5.0f} s] {self.name}", file=sys.stderr, flush=True)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        passed = time.perf_counter() - self.start
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + passed
        write_json(self.file, self.seconds)

    def left(self) -> float:
        """Seconds of the budget that remain, in the middle of a stage."""
        return self.budget - sum(self.seconds.values()) - (time.perf_counter() - self.start)


def _line(what: str) -> Callable[[int, int], None]:
    """Progress as a line that rewrites itself."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r  {what}: {done:,} / {total:,}", end=end, file=sys.stderr, flush=True)

    return show


def _planned(kind: type[T], run_dir: Path, plan: Callable[[], T]) -> T:
    """The config that the run folder holds, or a new plan: an interrupted run keeps its number of steps."""
    file = run_dir / "config.yaml"
    return configs.load(kind, file) if file.is_file() else plan()


def _plan_refiner(out: Path, clock: _Clock, seed: int) -> RefinerRun:
    run = configs.load(RefinerRun, "refiner/quickstart")
    data = dataclasses.replace(run.data, images=out / "data" / "train", feature_cache=out / "features")
    run = dataclasses.replace(run, data=data, loop=dataclasses.replace(run.loop, seed=seed))
    task = RefinerTask(run, progress=_line("VFM features"))
    each = seconds_per_step(task, run.optim, run.loop)
    return dataclasses.replace(run, loop=_fitted(run.loop, 0.05 * _for_training(clock) / each))


def _plan_tokenizer(out: Path, clock: _Clock, seed: int) -> TokenizerRun:
    run = configs.load(TokenizerRun, "tokenizer/quickstart")
    data = dataclasses.replace(
        run.data,
        images=out / "data" / "train",
        evaluation=out / "data" / "held-out",
        feature_cache=out / "features",
    )
    loop = dataclasses.replace(run.loop, seed=seed)
    run = dataclasses.replace(run, prior=out / "refiner", data=data, loop=loop)
    # The perturbed decodes and the discriminator join late: each part is timed and counts for its share.
    seconds = []
    for mcr, gan in ((False, False), (True, False), (True, True)):
        loss = dataclasses.replace(
            run.loss,
            mcr=run.loss.mcr if mcr else 0.0,
            gan=run.loss.gan if gan else 0.0,
            mcr_start=0.0,
            gan_start=0.0,
            discriminator_start=0.0,
        )
        task = TokenizerTask(dataclasses.replace(run, loss=loss))
        seconds.append(seconds_per_step(task, run.optim, loop, steps=5))
    first, moved, judged = seconds
    late, later = 1 - run.loss.mcr_start, 1 - run.loss.discriminator_start
    each = first + late * max(0.0, moved - first) + later * max(0.0, judged - moved)
    return dataclasses.replace(run, loop=_fitted(loop, 0.50 * _for_training(clock) / each))


def _plan_generator(out: Path, clock: _Clock, seed: int) -> GeneratorRun:
    run = configs.load(GeneratorRun, "generator/quickstart")
    run = dataclasses.replace(
        run,
        latents=out / "latents" / "train",
        held_out_latents=out / "latents" / "held-out",
        loop=dataclasses.replace(run.loop, seed=seed),
    )
    each = seconds_per_step(GeneratorTask(run), run.optim, run.loop)
    return dataclasses.replace(run, loop=_fitted(run.loop, 0.95 * _for_training(clock) / each))


def _for_training(clock: _Clock) -> float:
    """Seconds left when sampling, measuring and the report have had theirs."""
    return max(10.0, clock.left() - 20 - 0.15 * clock.budget)


def _fitted(loop: LoopConfig, steps: float) -> LoopConfig:
    """A loop of so many steps, evaluated five times."""
    steps = max(10, int(steps) // 10 * 10)
    return dataclasses.replace(loop, steps=steps, evaluate_every=max(10, steps // 5))


def _measure(
    out: Path, tokenizer: Autoencoder, judged: PackedImages, budget: float, seed: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Reconstruction and generation metrics, and the samples; kept in evaluation.json and samples.npz."""
    generator = load_generator(out / "generator")
    facts = check_pair(out / "tokenizer", out / "generator")
    count = max(108, min(1800, int(budget / 2) // 9 * 9))
    labels = balanced_labels(count, len(CATEGORIES))
    show = _line("sampling")
    batches: list[Tensor] = []
    for images in sample_images(tokenizer, generator, labels, SAMPLER, seed=seed, batch_size=60):
        batches.append(images)
        show(sum(map(len, batches)), count)
    samples = torch.cat(batches)
    with whole_file(out / "samples.npz") as partial, partial.open("wb") as file:
        np.savez(file, quantize(samples).permute(0, 2, 3, 1).numpy(), labels.numpy())
    extractor = load_extractor("vgg16")  # not the encoder's own features: they would judge in their own cause
    train = PackedImages(out / "data" / "train")
    chosen = np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(int).tolist()
    real = real_images(train, 64, name="emoji of the training set", rows=chosen)
    record = {
        "reconstruction": evaluate_reconstruction(
            tokenizer,
            real_images(judged, 64, name="held-out emoji"),
            extractor=extractor,
            lpips=load_perceptual("vgg"),
            batch_size=64,
            min_samples=2,
        ),
        "samples": evaluate_samples(
            tensor_images(samples, facts={"seed": seed, **configs.to_dict(SAMPLER), **facts}),
            reference_of(features_of(real, extractor, 64), real.name, real.preprocessing),
            extractor=extractor,
            batch_size=64,
            min_samples=2,  # the page shows the floor of so few beside the distance
        ),
    }
    write_json(out / "evaluation.json", record)
    return record, samples, labels
