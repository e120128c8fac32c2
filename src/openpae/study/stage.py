"""A stage of a study. Its id is a hash of everything that its result depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from openpae.eval.settings import ExtractorName
from openpae.runtime import processes
from openpae.storage.files import read_fields
from openpae.study.settings import JudgeSettings, MeasureSettings

StageKind = Literal[
    "pack", "features", "refiner", "raw-targets", "tokenizer", "measure", "latents", "generator", "reference",
    "own-reference", "judge",
]  # fmt: skip


def read_stage(file: Path) -> dict[str, Any]:
    """The record of a finished stage, as `once.run_stage` writes it.

    Raises:
        ValueError: the file is no such record.
    """
    texts, mappings = dict.fromkeys(("stage", "commit"), str), dict.fromkeys(("inputs", "settings"), dict)
    return read_fields(file, metrics=dict, seconds=float, **texts, **mappings)


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Settings of packed images."""

    size: int
    every: int = 1
    count: int | None = None
    """Number of images from the first on; None takes all."""


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Settings of cached VFM features."""

    encoder: str
    encoder_source: str | None
    image_size: int
    patch_size: int
    flips: bool


@dataclass(frozen=True, kw_only=True)
class RawSettings:
    """Settings of raw targets."""

    projection: Literal["pca", "random"]
    latent_dim: int
    encoder: str
    encoder_source: str | None
    image_size: int
    patch_size: int
    count: int


@dataclass(frozen=True, kw_only=True)
class MeasureStage:
    """Settings of the measurement of a tokenizer."""

    settings: MeasureSettings
    image_size: int


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Settings of cached latents of the training images."""

    image_size: int
    flips: bool
    count: int | None = None
    """Number of images from the first on; None takes all."""
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """Settings of a reference for samples: features of real images, or of their reconstructions."""

    extractor: ExtractorName
    extractor_weights: Path | None
    image_size: int
    count: int | None
    """Number of images, evenly spread; None takes all."""


@dataclass(frozen=True, kw_only=True)
class JudgeStage:
    """Settings of the evaluation of a generator's checkpoint. Stage ids contain the class name."""

    settings: JudgeSettings
    step: int
    image_size: int


@dataclass(frozen=True)
class Stage:
    """One piece of work with a folder as its result."""

    kind: StageKind
    settings: Any
    """A config. Its paths are placeholders: locations do not change the id."""
    inputs: tuple[tuple[str, str], ...]
    """Role -> id of another stage, or of a root."""
    label: str = field(compare=False)
    """Name for messages: the first row that needs the stage."""

    @property
    def id(self) -> str:
        """Kind and a hash of settings and inputs; the name of the stage's folder."""
        content = json.dumps([self.kind, settings_of(self.settings), sorted(self.inputs)], sort_keys=True)
        return f"{self.kind}-{short_hash(content)}"


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """The folders of stages."""

    out: Path
    roots: Mapping[str, str]
    """Id -> path given by the user, or name of a tokenizer that is not trained here."""

    def folder(self, name: str) -> Path:
        """Return the folder of a stage or root."""
        return Path(self.roots[name]) if name in self.roots else self.out / "stages" / name

    def record(self, name: str) -> Path:
        """Return the record of a stage; the file exists once the stage is done."""
        return self.out / "stages" / f"{name}.json"

    def lock(self, name: str) -> Path:
        """Return the lock file of a stage."""
        return self.out / "stages" / ".locks" / name

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold the lock of a stage; under torchrun rank 0 holds it for all processes."""
        lock = FileLock(self.lock(name))

        def acquire() -> None:
            self.lock(name).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()

        processes.on_rank0(acquire)
        try:
            yield
        finally:
            lock.release()


def settings_of(settings: Any) -> Any:
    """Return the fields of a config that can change a result: all but paths and device."""
    if dataclasses.is_dataclass(settings):
        return {"kind": type(settings).__name__} | {
            part.name: settings_of(getattr(settings, part.name))
            for part in dataclasses.fields(settings)
            if part.name not in ("device", "num_workers")
            and not ("added" in part.metadata and getattr(settings, part.name) == part.default)
        }
    if isinstance(settings, tuple):
        return [settings_of(value) for value in settings]
    return "a path" if isinstance(settings, Path) else settings


def short_hash(content: str) -> str:
    """Return the first 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]
