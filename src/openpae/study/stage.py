"""A stage of a study: one piece of work, named by everything that its result depends on."""

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
from openpae.study.settings import JudgeSettings, MeasureSettings

StageKind = Literal[
    "pack",
    "features",
    "refiner",
    "raw-targets",
    "tokenizer",
    "measure",
    "latents",
    "generator",
    "reference",
    "own-reference",
    "judge",
]


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Packed images."""

    size: int
    every: int = 1
    count: int | None = None
    """The first so many of these; None takes all."""


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Cached VFM features of packed images."""

    encoder: str
    encoder_source: str | None
    image_size: int
    patch_size: int
    flips: bool


@dataclass(frozen=True, kw_only=True)
class RawSettings:
    """Raw targets."""

    projection: Literal["pca", "random"]
    latent_dim: int
    encoder: str
    encoder_source: str | None
    image_size: int
    patch_size: int
    count: int


@dataclass(frozen=True, kw_only=True)
class MeasureStage:
    """One tokenizer measured."""

    settings: MeasureSettings
    image_size: int


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Cached latents of the training images."""

    image_size: int
    flips: bool
    count: int | None = None
    """The first so many images; None takes all."""
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """What samples are compared with: real images, or a tokenizer's reconstructions of them, in the features
    of an extractor."""

    extractor: ExtractorName
    extractor_weights: Path | None
    image_size: int
    count: int | None
    """So many of the images, evenly spread; None takes all."""


@dataclass(frozen=True, kw_only=True)
class JudgeStage:
    """One checkpoint of a generator judged."""

    settings: JudgeSettings
    step: int
    image_size: int


@dataclass(frozen=True)
class Stage:
    """One piece of work whose result is a folder."""

    kind: StageKind
    settings: Any
    """A config; its paths are placeholders, since where things are is no part of what they are."""
    inputs: tuple[tuple[str, str], ...]
    """Role -> id of another stage, or of a root."""
    label: str = field(compare=False)
    """For people: the first row that needs it."""

    @property
    def id(self) -> str:
        """Kind and 16 hexadecimal digits over settings and inputs: the name of its folder."""
        content = json.dumps([self.kind, settings_of(self.settings), sorted(self.inputs)], sort_keys=True)
        return f"{self.kind}-{short_hash(content)}"


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """Where stages have their folders."""

    out: Path
    roots: Mapping[str, str]
    """Id -> a path of the user's, or the text of a tokenizer that is not trained here."""

    def folder(self, name: str) -> Path:
        """The folder of a stage or root."""
        return Path(self.roots[name]) if name in self.roots else self.out / "stages" / name

    def record(self, name: str) -> Path:
        """The file that says that a stage is done."""
        return self.out / "stages" / f"{name}.json"

    def lock(self, name: str) -> Path:
        """The file that a process holds while it works on a stage."""
        return self.out / "stages" / ".locks" / name

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold the lock of a stage for the block; under torchrun the first process holds it for all."""
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
    """What a config says that can change a result: all but where files are and where it runs."""
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
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]
