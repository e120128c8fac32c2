"""The work of each kind of stage. Each function resumes after an interruption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpae import config as configs
from openpae.data.caches import cache_features, cache_latents, cache_latents_of_features, cache_targets
from openpae.data.images import ImageSource, PackedImages, Subset, open_images, spread
from openpae.data.packing import pack_images
from openpae.data.pixels import image_grid
from openpae.data.shards import Shards
from openpae.eval.evaluate import evaluate_samples
from openpae.eval.features import features_of
from openpae.eval.image_stream import Batch, ImageStream, real_images, sampled_images
from openpae.eval.reference import reference_of, save_reference
from openpae.geometry.measure import measure_tokenizer
from openpae.interop.spaces import LatentSpace, open_tokenizer
from openpae.models.encoders import EncoderInput, encoder_fingerprint, load_encoder
from openpae.models.saved import load_generator, load_prior, load_tokenizer
from openpae.runtime import processes
from openpae.runtime.device import pick_device
from openpae.sampling.sampler import balanced_labels
from openpae.storage.files import write_json
from openpae.storage.model_folder import checkpoint_path, identity_of, trained_classes
from openpae.study import shared
from openpae.study.stage import (
    FeatureSettings,
    JudgeStage,
    LatentSettings,
    MeasureStage,
    PackSettings,
    RawSettings,
    ReferenceSettings,
    Stage,
    StageKind,
    StageLayout,
)
from openpae.train.generator import train_generator
from openpae.train.refiner import train_refiner
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.targets import fit_targets
from openpae.train.tokenizer import train_tokenizer

Metrics = dict[str, dict[str, Any]]
"""Name -> value and stderr."""

REFERENCE = "reference.npz"
"""Name of the reference in its stage's folder."""

SHOWN = 10
"""Number of samples of a generator in the report."""


class StageFolders:
    """The folders of a stage and of its inputs."""

    def __init__(self, stage: Stage, layout: StageLayout) -> None:
        self.folder = layout.folder(stage.id)
        self.inputs = {role: layout.folder(name) for role, name in stage.inputs}
        external = dict(stage.inputs).get("tokenizer", "")
        self.external = layout.roots.get(external)


def _pack(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, settings = StageFolders(stage, layout), _settings(stage, PackSettings)
    source = open_images(at.inputs["images"])
    rows = range(0, len(source), settings.every)[: settings.count]
    pack_images(Subset(source, rows), at.folder, size=settings.size)
    return {}


def _features(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, settings = StageFolders(stage, layout), _settings(stage, FeatureSettings)
    device = pick_device("auto")
    encoder = load_encoder(settings.encoder, settings.encoder_source)
    prepare = EncoderInput(encoder.spec, settings.patch_size).to(device)
    network: Callable[[Tensor], Tensor] = encoder.to(device)
    side = settings.image_size // settings.patch_size
    cache_features(
        lambda x: network(prepare(x)),
        open_images(at.inputs["images"]),
        at.folder,
        image_size=settings.image_size,
        shape=(side**2, encoder.spec.dim),
        encoder_fingerprint=encoder_fingerprint(encoder),
        flips=settings.flips,
        device=device,
    )
    return {}


def _refiner(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, run = StageFolders(stage, layout), _settings(stage, RefinerRun)
    data = dataclasses.replace(
        run.data, images=at.inputs["images"], feature_cache=at.inputs.get("features"), evaluation=None
    )
    train_refiner(_begun(dataclasses.replace(run, data=data), at.folder), at.folder, quiet=quiet)
    return {}


def _raw_targets(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, settings = StageFolders(stage, layout), _settings(stage, RawSettings)

    def fit() -> None:
        if not at.folder.exists():
            fit_targets(
                load_encoder(settings.encoder, settings.encoder_source),
                open_images(at.inputs["images"]),
                at.folder,
                kind=settings.projection,
                latent_dim=settings.latent_dim,
                image_size=settings.image_size,
                patch_size=settings.patch_size,
                count=settings.count,
                device=pick_device("auto"),
            )

    processes.on_rank0(fit)
    return {}


def _tokenizer(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, run = StageFolders(stage, layout), _settings(stage, TokenizerRun)
    features, prior = at.inputs.get("features"), at.inputs.get("prior")
    if features is not None and prior is not None:
        _cache_targets(prior, features, layout)
    data = dataclasses.replace(
        run.data, images=at.inputs["images"], feature_cache=features, evaluation=at.inputs.get("held-out")
    )
    run = dataclasses.replace(run, data=data, prior=prior)
    train_tokenizer(_begun(run, at.folder), at.folder, quiet=quiet)
    return {}


def _cache_targets(prior: Path, features: Path, layout: StageLayout) -> None:
    """Make the targets' cache before training, in one process; the others wait."""
    name = identity_of(prior).fingerprint
    folder = features.with_name(f"{features.name}-{name}")
    with layout.alone(folder.name):
        targets = load_prior(prior)
        cache_targets(
            targets.to(pick_device("auto")),
            Shards(features, kind="features"),
            folder,
            prior_fingerprint=name,
            latent_dim=targets.latent_dim,
            device=pick_device("auto"),
        )


def _measure(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, part = StageFolders(stage, layout), _settings(stage, MeasureStage)
    settings, device = part.settings, pick_device("auto")
    segmented = None
    if "label-maps" in at.inputs:
        segmented = shared.segmented(
            at.inputs["label-images"],
            at.inputs["label-maps"],
            part.image_size,
            settings.label_count,
            settings.ignore,
        )
    held_out = at.inputs["held-out"]
    real = shared.measured_features(
        held_out,
        part.image_size,
        settings.extractor,
        settings.extractor_weights,
        settings.metrics,
        device,
    )
    measured = processes.on_rank0(
        lambda: measure_tokenizer(
            _space(at, device),
            open_images(held_out),
            size=part.image_size,
            segmented=segmented,
            lpips=shared.perceptual(settings.lpips, device),
            real=real,
            config=settings.metrics,
        )
    )
    names = {"frechet": "rfid", "interpolated_frechet": "ifid"}
    return {
        names.get(name, name): {"value": estimate.value, "stderr": estimate.stderr}
        for name, estimate in measured.metrics.items()
    }


def _latents(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, settings = StageFolders(stage, layout), _settings(stage, LatentSettings)
    device = pick_device("auto")
    source: ImageSource = open_images(at.inputs["images"])
    if settings.count is not None and settings.count < len(source):
        source = Subset(source, range(settings.count))
    features = at.inputs.get("features")
    if features is not None and isinstance(source, PackedImages):
        model = load_tokenizer(at.inputs["tokenizer"], decode_only=True).to(device)
        cache_latents_of_features(
            model.encode,
            source,
            Shards(features, kind="features"),
            at.folder,
            latent_shape=model.config.latent_shape,
            tokenizer_fingerprint=identity_of(at.inputs["tokenizer"]).fingerprint,
            batch_size=settings.batch_size,
            flips=settings.flips,
            device=device,
        )
        return {}
    space = _space(at, device)
    cache_latents(
        space.encode,
        source,
        at.folder,
        image_size=settings.image_size,
        latent_shape=space.latent_shape(settings.image_size),
        tokenizer_fingerprint=space.fingerprint,
        batch_size=settings.batch_size,
        flips=settings.flips,
        device=device,
    )
    return {}


def _generator(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, run = StageFolders(stage, layout), _settings(stage, GeneratorRun)
    run = dataclasses.replace(
        run, latents=at.inputs["latents"], held_out_latents=None, tokenizer=None, evaluation_images=None
    )
    train_generator(_begun(run, at.folder), at.folder, quiet=quiet)
    return {}


def _reference(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, settings = StageFolders(stage, layout), _settings(stage, ReferenceSettings)
    source = open_images(at.inputs["images"])
    rows = None if settings.count is None else spread(len(source), settings.count)
    stream = real_images(source, settings.image_size, rows=rows)
    _keep_reference(stream, settings, at.folder)
    return {}


def _own_reference(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, settings = StageFolders(stage, layout), _settings(stage, ReferenceSettings)
    device = pick_device("auto")
    latents, tokenizer = Shards(at.inputs["latents"], kind="latents"), _decoder(at, device)
    rows = spread(len(latents), settings.count or len(latents))

    def batches(size: int) -> Iterator[Batch]:
        own = processes.rank_slice(len(rows))
        for start in range(0, len(own), size):
            part = own[start : start + size]
            chosen = rows[list(part)]
            z = latents.gather(chosen, np.zeros_like(chosen)).to(device)  # 0: not mirrored
            with torch.no_grad():
                yield Batch(tokenizer.decode(z.float()).clamp(0, 1).float(), part)

    stream = ImageStream(
        name=at.inputs["latents"].name,
        count=len(rows),
        size=(settings.image_size, settings.image_size),
        preprocessing="decoded, clamped to [0, 1]",
        batches=batches,
    )
    _keep_reference(stream, settings, at.folder)
    return {}


def _keep_reference(stream: ImageStream, settings: ReferenceSettings, folder: Path) -> None:
    extractor = shared.extractor(settings.extractor, settings.extractor_weights, pick_device("auto"))
    reference = reference_of(features_of(stream, extractor), stream.name, stream.preprocessing)

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_reference(reference, folder / REFERENCE)

    processes.on_rank0(save)


def _evaluate_samples(stage: Stage, layout: StageLayout, quiet: bool) -> Metrics:
    at, part = StageFolders(stage, layout), _settings(stage, JudgeStage)
    settings, device = part.settings, pick_device("auto")
    folder = checkpoint_path(at.inputs["generator"], part.step)
    generator = load_generator(folder).to(device)
    stream = sampled_images(
        _decoder(at, device),
        generator,
        balanced_labels(settings.samples, trained_classes(folder, generator.config.num_classes)),
        settings.sampler,
        size=part.image_size,
        seed=settings.seed,
        precision=settings.precision,
        facts={"labels": "class-balanced", "step": part.step},
    )
    name, weights = settings.extractor, settings.extractor_weights
    shown: list[Tensor] = []
    own = at.inputs.get("own-reference")
    others = {} if own is None else {"own": shared.reference(own / REFERENCE, name, weights, device)}

    def batches(size: int) -> Iterator[Batch]:
        for batch in stream.batches(size):
            shown.extend(batch.images[: SHOWN - len(shown)].cpu())
            yield batch

    known = at.inputs["reference"]
    reference = shared.reference(known if known.is_file() else known / REFERENCE, name, weights, device)
    record = evaluate_samples(
        dataclasses.replace(stream, batches=batches),
        reference,
        extractor=shared.extractor(name, weights, device),
        batch_size=settings.batch_size,
        min_samples=2,  # the report shows the floor at this count beside the distance
        others=others,
    )

    def keep() -> None:
        at.folder.mkdir(parents=True, exist_ok=True)
        write_json(at.folder / "evaluation.json", record)
        image_grid(torch.stack(shown), SHOWN).save(at.folder / "samples.png")

    processes.on_rank0(keep)
    names = {"frechet": "gfid", "frechet_floor": "gfid_floor", "frechet_own": "gfid_own"}
    return {
        names.get(name, name): {"value": metric["value"], "stderr": metric["stderr"]}
        for name, metric in record["metrics"].items()
    }


WORK: Mapping[StageKind, Callable[[Stage, StageLayout, bool], Metrics]] = {
    "pack": _pack,
    "features": _features,
    "refiner": _refiner,
    "raw-targets": _raw_targets,
    "tokenizer": _tokenizer,
    "measure": _measure,
    "latents": _latents,
    "generator": _generator,
    "reference": _reference,
    "own-reference": _own_reference,
    "judge": _evaluate_samples,
}
"""Kind -> function of (stage, layout, quiet). Under torchrun every process calls it."""


def _settings(stage: Stage, kind: type[configs.T]) -> configs.T:
    assert isinstance(stage.settings, kind)
    return stage.settings


def _begun(run: configs.T, folder: Path) -> configs.T:
    """Update the paths in the config of a run that began before OUT was moved."""
    if processes.is_rank0() and (folder / "config.yaml").is_file():
        configs.save(run, folder / "config.yaml")
    return run


def _space(at: StageFolders, device: torch.device) -> LatentSpace:
    return open_tokenizer(at.external or f"openpae:{at.inputs['tokenizer']}", device)


def _decoder(at: StageFolders, device: torch.device) -> Any:
    if at.external is None:
        return load_tokenizer(at.inputs["tokenizer"], decode_only=True).to(device)
    space = _space(at, device)
    if space.decode is None:
        raise ValueError(f"{at.external} has no decoder, so it cannot decode samples; set generate: false")
    return space
