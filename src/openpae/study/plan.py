"""The stages that studies need. Equal stages have equal ids, so each runs once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpae import config as configs
from openpae.data.classes import check_images_agree
from openpae.data.images import open_images
from openpae.storage.files import file_hash
from openpae.study.settings import JudgeSettings, Resolved, Study, StudyData, StudyRow, StudySetup, resolve
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
    read_stage,
    short_hash,
)
from openpae.train.settings import GeneratorRun, TokenizerRun


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row with one seed, and the stages of its results."""

    study: str
    row: str
    seed: int
    tokenizer: str
    """Id of a stage, or of a root if the tokenizer is not trained here."""
    measure: str
    generator: str | None
    evaluations: Mapping[int, str]
    """Step of the generator -> id of the stage that evaluates its samples."""
    own: tuple[str, ...]
    """Ids of the stages of this run, without those that all rows share (images, features, targets)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All stages of a call of `pae study`."""

    studies: tuple[Study, ...]
    stages: Mapping[str, Stage]
    """By id, inputs before the stages that use them."""
    runs: tuple[Run, ...]
    layout: StageLayout

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of a stage; None if it is not done."""
        file = self.layout.record(name)
        return read_stage(file) if file.is_file() else None


def own_data(studies: Sequence[Study]) -> StudyData:
    """Return the images that the studies name.

    Raises:
        FileNotFoundError: the images do not exist.
        ValueError: the studies name no images, or different ones.
    """
    setups = {study.setup: configs.load(StudySetup, study.setup) for study in studies}
    for name, setup in setups.items():
        if setup.data is None:
            raise ValueError(f"{name} names no images; say where yours are with --images and --held-out")
    data, *others = (setup.data for setup in setups.values())
    assert data is not None
    if any(other != data for other in others):
        raise ValueError(f"{' and '.join(setups)} name different images; give --images and --held-out")
    for path in (data.images, data.held_out, data.label_images, data.label_maps):
        if path is not None and not path.exists():
            raise FileNotFoundError(
                f"no images at {path}, where {next(iter(setups))} has them; put them there, or say where "
                "yours are with --images, --held-out and, for SSC, --label-images and --label-maps"
            )
    return data


def make_plan(
    studies: Sequence[Study],
    data: StudyData,
    out: Path,
    *,
    changes: Sequence[str] = (),
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Plan:
    """Plan the stages of studies over one set of images.

    The order is seed by seed, so that an interrupted study has a full table sooner.

    Args:
        studies: studies with different names.
        data: paths of the images.
        out: folder for all results.
        changes: changes to all rows, after their own: STAGE.FIELD=VALUE.
        rows: names of rows to run; empty runs all.
        seeds: seeds that replace the studies' own.

    Raises:
        FileNotFoundError: there are no images.
        ValueError, TypeError: settings are wrong or do not fit each other; the message names the row.
    """
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise ValueError(f"studies must have different names, got {', '.join(names)}")
    known = {row.name for study in studies for row in study.rows}
    if unknown := [name for name in rows if name not in known]:
        raise ValueError(f"no row {unknown[0]!r}; rows: {', '.join(sorted(known))}")
    draft = _Draft(data, out.resolve())
    chosen = [dataclasses.replace(study, seeds=tuple(seeds) or study.seeds) for study in studies]
    for study in chosen:
        setup = configs.load(StudySetup, study.setup)
        resolved = resolve_rows(study, changes)
        for seed in study.seeds:
            for row in study.rows:
                if not rows or row.name in rows:
                    draft.add_run(study, setup, row, resolved[row.name], seed)
    return Plan(
        studies=tuple(chosen),
        stages=draft.stages,
        runs=tuple(draft.runs),
        layout=StageLayout(out=draft.out, roots=draft.roots),
    )


def snapshots(run: GeneratorRun) -> list[int]:
    """Return the steps whose checkpoints a generator's run keeps, and the last step."""
    every, last = run.loop.keep_every, run.loop.steps
    return [*range(every, last, every), last] if every else [last]


class _Draft:
    """A plan under construction."""

    def __init__(self, data: StudyData, out: Path) -> None:
        self.data, self.out = data, out
        self.stages: dict[str, Stage] = {}
        self.runs: list[Run] = []
        self.roots: dict[str, str] = {}
        self.label = ""
        names, others = (open_images(path).classes for path in (data.images, data.held_out))
        check_images_agree(data.images, names, data.held_out, others)
        self.classes = len(names)
        self.images, self.held_out = (
            self._root("images", _content(path), path) for path in (data.images, data.held_out)
        )
        self.label_maps = self._label_maps()
        self.reference = self._reference()

    def add_run(self, study: Study, setup: StudySetup, row: StudyRow, parts: Resolved, seed: int) -> None:
        self.label = f"{study.name}: {row.name}, seed {seed}"
        size = parts.tokenizer.model.image_size
        train = self._images(self.images, setup, size, setup.every)
        held_out = self._images(self.held_out, setup, size, 1)
        features = None
        if row.tokenizer_from is not None:
            tokenizer = self._root("external", row.tokenizer_from, row.tokenizer_from)
        else:
            config = configs.changed(parts.tokenizer, {"loop.seed": seed})
            features = self._features(config, train)
            prior = self._prior(setup, row, parts, train, features)
            if prior is None:
                config = dataclasses.replace(config, prior=None)
            evaluation = None if config.data.evaluation is None else held_out
            inputs = {"images": train, "features": features, "prior": prior, "held-out": evaluation}
            tokenizer = self._add("tokenizer", config, inputs)
        measure = self._add(
            "measure",
            MeasureStage(settings=parts.measure, image_size=size),
            {"tokenizer": tokenizer, "held-out": held_out, **self.label_maps},
        )
        generator, evaluations, own = None, {}, [tokenizer, measure]
        if row.generate:
            self._check_classes(parts.generator)
            # The latents of mirror images need the features of mirror images.
            cached = features if parts.tokenizer.data.augment == "flip" or not setup.flips else None
            latents = self._add(
                "latents",
                LatentSettings(image_size=size, flips=setup.flips),
                {"tokenizer": tokenizer, "images": train, "features": cached},
            )
            trained = configs.changed(parts.generator, {"loop.seed": seed})
            generator = self._add("generator", trained, {"latents": latents})
            own_reference = self._own_reference(parts.judge, size, tokenizer, latents)
            against = {
                "reference": self._real_reference(parts.judge, size, train),
                "own-reference": own_reference,
            }
            evaluations = self._evaluations(trained, parts.judge, size, tokenizer, generator, against)
            own += [latents, generator, *([own_reference] if own_reference else []), *evaluations.values()]
        run = Run(
            study=study.name, row=row.name, seed=seed, tokenizer=tokenizer, measure=measure,
            generator=generator, evaluations=evaluations,
            own=tuple(name for name in own if name in self.stages),
        )  # fmt: skip
        self.runs.append(run)

    def _evaluations(
        self,
        run: GeneratorRun,
        settings: JudgeSettings,
        size: int,
        tokenizer: str,
        generator: str,
        against: Mapping[str, str | None],
    ) -> dict[int, str]:
        steps = snapshots(run) if settings.curve else [run.loop.steps]
        # These fields do not change the samples; the references hold the counts of real images.
        plain = dataclasses.replace(settings, curve=False, reference_images=None, own_images=0)
        inputs = {"tokenizer": tokenizer, "generator": generator, **against}
        return {
            step: self._add("judge", JudgeStage(settings=plain, step=step, image_size=size), inputs)
            for step in steps
        }

    def _real_reference(self, settings: JudgeSettings, size: int, train: str) -> str:
        root = self.reference or train
        if root in self.roots and Path(self.roots[root]).is_file():
            return root
        features = self._reference_settings(settings, size, settings.reference_images)
        return self._add("reference", features, {"images": root})

    def _own_reference(self, settings: JudgeSettings, size: int, tokenizer: str, latents: str) -> str | None:
        if not settings.own_images:
            return None
        features = self._reference_settings(settings, size, settings.own_images)
        return self._add("own-reference", features, {"tokenizer": tokenizer, "latents": latents})

    def _reference_settings(self, settings: JudgeSettings, size: int, count: int | None) -> ReferenceSettings:
        return ReferenceSettings(
            extractor=settings.extractor,
            extractor_weights=settings.extractor_weights,
            image_size=size,
            count=count,
        )

    def _images(self, root: str, setup: StudySetup, size: int, every: int) -> str:
        if not setup.pack:
            return root
        return self._add("pack", PackSettings(size=size, every=every), {"images": root})

    def _features(self, run: TokenizerRun, train: str) -> str | None:
        if run.data.feature_cache is None:
            return None
        settings = FeatureSettings(
            encoder=run.model.encoder,
            encoder_source=run.model.encoder_source,
            image_size=run.model.image_size,
            patch_size=run.model.decoder.patch_size,
            flips=run.data.augment == "flip",
        )
        return self._add("features", settings, {"images": train})

    def _prior(
        self, setup: StudySetup, row: StudyRow, parts: Resolved, train: str, features: str | None
    ) -> str | None:
        if not parts.tokenizer.loss.needs_prior:
            return None
        model = parts.tokenizer.model
        if row.targets != "refined":
            raw = RawSettings(
                projection=row.targets,
                latent_dim=model.latent_dim,
                encoder=model.encoder,
                encoder_source=model.encoder_source,
                image_size=model.image_size,
                patch_size=model.decoder.patch_size,
                count=setup.raw_count,
            )
            return self._add("raw-targets", raw, {"images": train})
        # Without cached features a refiner sees other crops than a tokenizer with them.
        cached = features if parts.refiner.data.feature_cache is not None else None
        return self._add("refiner", parts.refiner, {"images": train, "features": cached})

    def _label_maps(self) -> dict[str, str]:
        images, maps = self.data.label_images, self.data.label_maps
        if images is None or maps is None:
            return {}
        content = _listing(maps if maps.is_dir() else maps.with_suffix(""))
        return {
            "label-images": self._root("label-images", _content(images), images),
            "label-maps": self._root("label-maps", content, maps),
        }

    def _reference(self) -> str | None:
        path = self.data.reference
        if path is None:
            return None
        if not path.exists():
            raise FileNotFoundError(f"no reference at {path}: neither an npz file nor a folder of images")
        content = file_hash(path) if path.is_file() else _content(path)
        return self._root("reference", content, path)

    def _check_classes(self, run: GeneratorRun) -> None:
        if run.model.num_classes != self.classes:
            raise ValueError(
                f"{self.label}: generator.model.num_classes is {run.model.num_classes}, but "
                f"{self.data.images} has {self.classes} classes; pass "
                f"--set generator.model.num_classes={self.classes}"
            )

    def _root(self, role: str, content: str, source: str | Path) -> str:
        name = f"{role}-{short_hash(content)}"
        self.roots[name] = str(source.resolve()) if isinstance(source, Path) else source
        return name

    def _add(self, kind: StageKind, settings: Any, inputs: Mapping[str, str | None]) -> str:
        given = tuple((role, name) for role, name in inputs.items() if name is not None)
        stage = Stage(kind, settings, given, self.label)
        self.stages.setdefault(stage.id, stage)
        return stage.id


def resolve_rows(study: Study, changes: Sequence[str] = ()) -> dict[str, Resolved]:
    """Map the name of each row to its configs, and check that they fit each other.

    Args:
        study: a study.
        changes: changes to all rows, after their own: STAGE.FIELD=VALUE.

    Raises:
        ValueError, TypeError: a change is invalid, or the configs do not fit; the message names the row.
    """
    setup = configs.load(StudySetup, study.setup)
    configs_of = {}
    for row in study.rows:
        at = f"{study.name}: {row.name}"
        try:
            configs_of[row.name] = resolve(setup, [*study.set, *row.set, *changes])
        except (ValueError, TypeError) as error:
            raise type(error)(f"{at}: {error}") from None
        _check_fit(at, row, configs_of[row.name])
    return configs_of


def _check_fit(at: str, row: StudyRow, parts: Resolved) -> None:
    refiner, tokenizer, generator = parts.refiner, parts.tokenizer, parts.generator
    if tokenizer.model.image_width is not None:
        raise ValueError(f"{at}: studies take square images; leave tokenizer.model.image_width out")
    if row.generate and parts.judge.curve and len(snapshots(generator)) == 1:
        raise ValueError(
            f"{at}: judge.curve needs checkpoints on the way; set generator.loop.keep_every below "
            f"{generator.loop.steps} steps"
        )
    if row.tokenizer_from is not None:
        return
    pairs: dict[str, tuple[object, object, str]] = {}
    if row.generate:
        pairs["latent shape"] = (generator.model.latent_shape, tokenizer.model.latent_shape, "generator")
    if tokenizer.loss.needs_prior and row.targets == "refined":
        pairs["encoder"] = (refiner.encoder, tokenizer.model.encoder, "refiner")
        pairs["latent_dim"] = (refiner.model.latent_dim, tokenizer.model.latent_dim, "refiner")
        pairs["grid"] = (refiner.model.grid_shape, tokenizer.model.grid_shape, "refiner")
        pairs["image_size"] = (refiner.image_size, tokenizer.model.image_size, "refiner")
        if None not in (refiner.data.feature_cache, tokenizer.data.feature_cache):
            pairs["data.augment"] = (refiner.data.augment, tokenizer.data.augment, "refiner")
    for label, (other, own, whose) in pairs.items():
        if other != own:
            raise ValueError(
                f"{at}: the {whose}'s {label} is {other}, the tokenizer's {own}; change both in the row's set"
            )


def _content(path: Path) -> str:
    """Return the part of a fingerprint that all versions have, so that older studies stay valid."""
    return open_images(path).fingerprint().partition(".")[0]


def _listing(folder: Path) -> str:
    """Return names and sizes of the PNGs in a folder of label maps."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of label maps at {folder}")
    files = sorted(folder.rglob("*.png"))
    return "".join(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n" for file in files)
