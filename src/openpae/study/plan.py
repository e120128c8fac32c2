"""From studies to the stages that they need: each is named by what it is made of, so none is done twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpae import config as configs
from openpae.data.classes import check_images_agree
from openpae.data.images import open_images
from openpae.storage.files import file_hash, read_json
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
    short_hash,
)
from openpae.train.settings import GeneratorRun, TokenizerRun


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row with a seed, and the stages that its numbers come from."""

    study: str
    row: str
    seed: int
    tokenizer: str
    """Id of a stage, or of a root for a tokenizer that is not trained here."""
    measure: str
    generator: str | None
    judges: Mapping[int, str]
    """Step of the generator -> id."""
    own: tuple[str, ...]
    """Ids of the stages made for this cell, without those shared by all rows (images, features, targets)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a call of `pae study` does."""

    studies: tuple[Study, ...]
    stages: Mapping[str, Stage]
    """By id, inputs before what needs them."""
    cells: tuple[Run, ...]
    places: StageLayout

    def record(self, name: str) -> dict[str, Any] | None:
        """What a stage left when it was done; None where it is not."""
        file = self.places.record(name)
        return read_json(file) if file.is_file() else None


def own_data(studies: Sequence[Study]) -> StudyData:
    """The images that the studies name themselves.

    Raises:
        FileNotFoundError: they are not where the studies say.
        ValueError: the studies name none, or not the same.
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
    """The stages of studies over one set of images.

    Seed by seed, so that an interrupted study has a whole table sooner.

    Args:
        studies: of different names.
        data: where the images are.
        out: folder for all results.
        changes: to all rows, over their own: STAGE.FIELD=VALUE.
        rows: take only these rows; none takes all.
        seeds: in place of the studies' own.

    Raises:
        FileNotFoundError: no images.
        ValueError, TypeError: settings that are wrong or do not fit each other; the message names the row.
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
                    draft.add_cell(study, setup, row, resolved[row.name], seed)
    return Plan(
        studies=tuple(chosen),
        stages=draft.stages,
        cells=tuple(draft.cells),
        places=StageLayout(out=draft.out, roots=draft.roots),
    )


def snapshots(run: GeneratorRun) -> list[int]:
    """The steps of which a generator's run keeps a checkpoint for good, and the last one."""
    every, last = run.loop.keep_every, run.loop.steps
    return [*range(every, last, every), last] if every else [last]


class _Draft:
    """A plan that grows."""

    def __init__(self, data: StudyData, out: Path) -> None:
        self.data, self.out = data, out
        self.stages: dict[str, Stage] = {}
        self.cells: list[Run] = []
        self.roots: dict[str, str] = {}
        names, others = (open_images(path).classes for path in (data.images, data.held_out))
        check_images_agree(data.images, names, data.held_out, others)
        self.classes = len(names)
        self.images, self.held_out = (
            self._root("images", _content(path), path) for path in (data.images, data.held_out)
        )
        self.label_maps = self._label_maps()
        self.reference = self._reference()

    def add_cell(self, study: Study, setup: StudySetup, row: StudyRow, parts: Resolved, seed: int) -> None:
        what = f"{study.name}: {row.name}, seed {seed}"
        size = parts.tokenizer.model.image_size
        train = self._images(self.images, setup, size, setup.every, what)
        held_out = self._images(self.held_out, setup, size, 1, what)
        features = None
        if row.tokenizer_from is not None:
            tokenizer = self._root("external", row.tokenizer_from, row.tokenizer_from)
        else:
            run = dataclasses.replace(
                parts.tokenizer, loop=dataclasses.replace(parts.tokenizer.loop, seed=seed)
            )
            features = self._features(run, train, what)
            prior = self._prior(setup, row, parts, train, features, what)
            if prior is None:
                run = dataclasses.replace(run, prior=None)
            evaluation = None if run.data.evaluation is None else held_out
            inputs = {"images": train, "features": features, "prior": prior, "held-out": evaluation}
            tokenizer = self._add("tokenizer", run, inputs, what)
        measure = self._add(
            "measure",
            MeasureStage(settings=parts.measure, image_size=size),
            {"tokenizer": tokenizer, "held-out": held_out, **self.label_maps},
            what,
        )
        generator, judges, own = None, {}, [tokenizer, measure]
        if row.generate:
            self._check_classes(parts.generator, what)
            # Cached features without those of the mirror images cannot give the latents of these.
            cached = features if parts.tokenizer.data.augment == "flip" or not setup.flips else None
            latents = self._add(
                "latents",
                LatentSettings(image_size=size, flips=setup.flips),
                {"tokenizer": tokenizer, "images": train, "features": cached},
                what,
            )
            trained = dataclasses.replace(
                parts.generator, loop=dataclasses.replace(parts.generator.loop, seed=seed)
            )
            generator = self._add("generator", trained, {"latents": latents}, what)
            own_reference = self._own_reference(parts.judge, size, tokenizer, latents, what)
            against = {
                "reference": self._real_reference(parts.judge, size, train, what),
                "own-reference": own_reference,
            }
            judges = self._judges(trained, parts.judge, size, tokenizer, generator, against, what)
            own += [latents, generator, *([own_reference] if own_reference else []), *judges.values()]
        cell = Run(
            study=study.name, row=row.name, seed=seed, tokenizer=tokenizer, measure=measure,
            generator=generator, judges=judges, own=tuple(name for name in own if name in self.stages),
        )  # fmt: skip
        self.cells.append(cell)

    def _judges(
        self,
        run: GeneratorRun,
        settings: JudgeSettings,
        size: int,
        tokenizer: str,
        generator: str,
        against: Mapping[str, str | None],
        what: str,
    ) -> dict[int, str]:
        steps = snapshots(run) if settings.curve else [run.loop.steps]
        # The same result, whoever asks; the numbers of real images are the references'.
        plain = dataclasses.replace(settings, curve=False, reference_images=None, own_images=0)
        inputs = {"tokenizer": tokenizer, "generator": generator, **against}
        return {
            step: self._add("judge", JudgeStage(settings=plain, step=step, image_size=size), inputs, what)
            for step in steps
        }

    def _real_reference(self, settings: JudgeSettings, size: int, train: str, what: str) -> str:
        root = self.reference or train
        if root in self.roots and Path(self.roots[root]).is_file():
            return root
        features = self._reference_settings(settings, size, settings.reference_images)
        return self._add("reference", features, {"images": root}, what)

    def _own_reference(
        self, settings: JudgeSettings, size: int, tokenizer: str, latents: str, what: str
    ) -> str | None:
        if not settings.own_images:
            return None
        features = self._reference_settings(settings, size, settings.own_images)
        return self._add("own-reference", features, {"tokenizer": tokenizer, "latents": latents}, what)

    def _reference_settings(self, settings: JudgeSettings, size: int, count: int | None) -> ReferenceSettings:
        return ReferenceSettings(
            extractor=settings.extractor,
            extractor_weights=settings.extractor_weights,
            image_size=size,
            count=count,
        )

    def _images(self, root: str, setup: StudySetup, size: int, every: int, what: str) -> str:
        if not setup.pack:
            return root
        return self._add("pack", PackSettings(size=size, every=every), {"images": root}, what)

    def _features(self, run: TokenizerRun, train: str, what: str) -> str | None:
        if run.data.feature_cache is None:
            return None
        settings = FeatureSettings(
            encoder=run.model.encoder,
            encoder_source=run.model.encoder_source,
            image_size=run.model.image_size,
            patch_size=run.model.decoder.patch_size,
            flips=run.data.augment == "flip",
        )
        return self._add("features", settings, {"images": train}, what)

    def _prior(
        self, setup: StudySetup, row: StudyRow, parts: Resolved, train: str, features: str | None, what: str
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
            return self._add("raw-targets", raw, {"images": train}, what)
        # A refiner without cached features would look at other crops than a tokenizer with them.
        cached = features if parts.refiner.data.feature_cache is not None else None
        return self._add("refiner", parts.refiner, {"images": train, "features": cached}, what)

    def _label_maps(self) -> dict[str, str]:
        images, maps = self.data.label_images, self.data.label_maps
        if images is None or maps is None:
            return {}
        content = _file_facts(maps if maps.is_dir() else maps.with_suffix(""))
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

    def _check_classes(self, run: GeneratorRun, what: str) -> None:
        if run.model.num_classes != self.classes:
            raise ValueError(
                f"{what}: generator.model.num_classes is {run.model.num_classes}, but {self.data.images} has "
                f"{self.classes} classes; pass --set generator.model.num_classes={self.classes}"
            )

    def _root(self, role: str, content: str, where: str | Path) -> str:
        name = f"{role}-{short_hash(content)}"
        self.roots[name] = str(where.resolve()) if isinstance(where, Path) else where
        return name

    def _add(self, kind: StageKind, settings: Any, inputs: Mapping[str, str | None], what: str) -> str:
        given = tuple((role, name) for role, name in inputs.items() if name is not None)
        stage = Stage(kind, settings, given, what)
        self.stages.setdefault(stage.id, stage)
        return stage.id


def resolve_rows(study: Study, changes: Sequence[str] = ()) -> dict[str, Resolved]:
    """Name of each row -> its configs, seen to fit each other before anything runs.

    Args:
        study: whose rows.
        changes: to all rows, over their own: STAGE.FIELD=VALUE.

    Raises:
        ValueError, TypeError: a change that cannot be made, or configs that do not fit; names the row.
    """
    setup = configs.load(StudySetup, study.setup)
    found = {}
    for row in study.rows:
        at = f"{study.name}: {row.name}"
        try:
            found[row.name] = resolve(setup, [*study.set, *row.set, *changes])
        except (ValueError, TypeError) as error:
            raise type(error)(f"{at}: {error}") from None
        _check_fit(at, row, found[row.name])
    return found


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
    for what, (other, own, whose) in pairs.items():
        if other != own:
            raise ValueError(
                f"{at}: the {whose}'s {what} is {other}, the tokenizer's {own}; change both in the row's set"
            )


def _content(path: Path) -> str:
    """The part of a fingerprint that all versions know: the results of older studies stay valid."""
    return open_images(path).fingerprint().partition(".")[0]


def _file_facts(folder: Path) -> str:
    """Names and sizes of the PNGs of a folder of label maps."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of label maps at {folder}")
    files = sorted(folder.rglob("*.png"))
    return "".join(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n" for file in files)
