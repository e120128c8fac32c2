"""How long a plan takes here: from stages that are done, or from the same stages rehearsed at small sizes."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from openpae.data.images import open_images
from openpae.storage.files import read_json
from openpae.study.once import run_stage
from openpae.study.plan import Plan
from openpae.study.stage import (
    FeatureSettings,
    JudgeStage,
    LatentSettings,
    MeasureStage,
    PackSettings,
    RawSettings,
    ReferenceSettings,
    Stage,
    settings_of,
)
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

TRAINING = (RefinerRun, TokenizerRun, GeneratorRun)
_STEPS, _IMAGES = (4, 12), (16, 48)
"""The two sizes of a rehearsal: optimizer steps, and images or samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a stage."""

    seconds: float
    rehearsed: bool
    """From a rehearsal, not from stages that are done."""


def estimates(
    plan: Plan, *, rehearse: bool = False, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Estimate]:
    """Seconds of the stages of a plan that are not done, as far as they can be told.

    Stages of one kind that differ in seed, steps and inputs alone count as equally quick. Of each kind that
    is done somewhere below OUT the mean time per unit is taken (per step, or per stage).

    Args:
        plan: what is to be done.
        rehearse: run the others in a temporary folder at two small sizes each, and go on along the straight
            line through both times. It also shows that every stage runs. Otherwise they are left out.
        tell: is told what is rehearsed.
    """
    open_stages = [stage for stage in plan.stages.values() if not plan.places.record(stage.id).is_file()]
    rates = _rates(plan.places.out / "stages")
    known = {
        stage.id: Estimate(seconds=rates[key] * _steps(stage.settings), rehearsed=False)
        for stage in open_stages
        if (key := _likeness(stage.kind, settings_of(stage.settings), dict(stage.inputs))) in rates
    }
    if rehearse and (left := [stage for stage in open_stages if stage.id not in known]):
        with tempfile.TemporaryDirectory(prefix="pae-study-") as scratch:
            known |= _Rehearsal(plan, Path(scratch), tell).estimates(left)
    return known


def _rates(folder: Path) -> dict[str, float]:
    """Seconds per step (or per stage, where there are no steps) of the kinds of stages that are done."""
    times: dict[str, list[float]] = {}
    for file in sorted(folder.glob("*.json")):
        record = read_json(file)
        key = _likeness(record["stage"], record["settings"], record["inputs"])
        times.setdefault(key, []).append(
            record["seconds"] / record["settings"].get("loop", {}).get("steps", 1)
        )
    return {key: mean(values) for key, values in times.items()}


def _likeness(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Equal for stages that take equally long per unit."""
    plain = json.loads(json.dumps(settings))
    plain.pop("step", None)
    if "loop" in plain:
        for name in ("seed", "steps", "save_every", "keep_last", "keep_every", "log_every"):
            plain["loop"].pop(name, None)
    # Of the caches the number of images counts, which the input holds.
    images = inputs.get("images") if "loop" not in plain else None
    return json.dumps([kind, plain, images], sort_keys=True)


def _steps(settings: Any) -> int:
    return settings.loop.steps if isinstance(settings, TRAINING) else 1


def _sizes(stage: Stage) -> tuple[int, int]:
    return _STEPS if isinstance(stage.settings, TRAINING) else _IMAGES


class _Rehearsal:
    """Small copies of stages, in a folder of their own."""

    def __init__(self, plan: Plan, scratch: Path, tell: Callable[[str], None]) -> None:
        self.plan, self.tell = plan, tell
        self.places = dataclasses.replace(plan.places, out=scratch)

    def estimates(self, stages: Iterable[Stage]) -> dict[str, Estimate]:
        """Of stages that were never done here."""
        lines: dict[str, tuple[float, float]] = {}
        found = {}
        for stage in stages:
            key = _likeness(stage.kind, settings_of(stage.settings), dict(stage.inputs))
            if key not in lines:
                self.tell(f"rehearsing {stage.kind}: {stage.label}")
                lines[key] = self._line(stage)
            start, slope = lines[key]
            found[stage.id] = Estimate(seconds=start + slope * self._units(stage), rehearsed=True)
        return found

    def _line(self, stage: Stage) -> tuple[float, float]:
        """Seconds at no units, and per unit."""
        small, large = _sizes(stage)
        self._small(stage, large)  # so that no input is made while the stage is timed
        self._small(stage, small)
        if isinstance(stage.settings, MeasureStage | JudgeStage):
            self._do(stage, small - 1)  # loads the networks that all such stages of a process share
        first, second = (float(self._do(stage, units)["seconds"]) for units in (small, large))
        slope = max(0.0, (second - first) / (large - small))
        return max(0.0, second - slope * large), slope

    def _do(self, stage: Stage, units: int) -> dict[str, Any]:
        return run_stage(self._small(stage, units), self.places, commit="", quiet=True)

    def _small(self, stage: Stage, units: int) -> Stage:
        """A small copy of a stage, whose inputs are done."""
        # Of cached features and latents there are as many as images.
        cached = isinstance(stage.settings, FeatureSettings | LatentSettings)
        inputs = tuple(
            (role, self._id(name, units if cached and role != "tokenizer" else None))
            for role, name in stage.inputs
        )
        return dataclasses.replace(stage, settings=self._shrunk(stage, units), inputs=inputs)

    def _id(self, name: str, units: int | None) -> str:
        """Id of a root, or of a small copy of a stage, which is done when this returns."""
        if name in self.places.roots:
            return name
        stage = self.plan.stages[name]
        small = self._small(stage, units or _sizes(stage)[1])
        run_stage(small, self.places, commit="", quiet=True)
        return small.id

    def _shrunk(self, stage: Stage, units: int) -> Any:
        """The settings of a stage at another size."""
        settings = stage.settings
        if isinstance(settings, TRAINING):
            loop = dataclasses.replace(
                settings.loop,
                steps=units,
                seconds=None,
                least_steps=1,
                save_every=units,
                keep_every=0,
                evaluate_every=0,
                seed=0,
            )
            return dataclasses.replace(settings, loop=loop)
        if isinstance(settings, PackSettings):
            every = settings.every * max(1, self._images(stage) // units)
            return dataclasses.replace(settings, every=every, count=units)
        if isinstance(settings, MeasureStage):
            whole = settings.settings
            share = units / whole.metrics.count
            metrics = dataclasses.replace(
                whole.metrics, count=units, lpc_count=max(1, round(whole.metrics.lpc_count * share))
            )
            labels = max(1, round(whole.label_count * share))
            return dataclasses.replace(
                settings, settings=dataclasses.replace(whole, metrics=metrics, label_count=labels)
            )
        if isinstance(settings, JudgeStage):
            judge = dataclasses.replace(settings.settings, samples=units)
            return dataclasses.replace(settings, settings=judge, step=_STEPS[1])
        if isinstance(settings, LatentSettings | RawSettings | ReferenceSettings):
            return dataclasses.replace(settings, count=units)
        return settings

    def _units(self, stage: Stage) -> int:
        settings = stage.settings
        if isinstance(settings, TRAINING):
            return int(settings.loop.steps)
        if isinstance(settings, MeasureStage):
            return settings.settings.metrics.count
        if isinstance(settings, JudgeStage):
            return settings.settings.samples
        if isinstance(settings, RawSettings | ReferenceSettings):
            images = self._images(stage)
            return min(settings.count or images, images)
        return self._images(stage)

    def _images(self, stage: Stage) -> int:
        """Images of a stage's source; packed ones after `every`."""
        inputs = dict(stage.inputs)
        if "images" not in inputs:  # reconstructions of latents
            return self._images(self.plan.stages[inputs["latents"]])
        name = inputs["images"]
        if name in self.plan.places.roots:
            every = stage.settings.every if isinstance(stage.settings, PackSettings) else 1
            return len(range(0, len(open_images(self.plan.places.folder(name))), every))
        return self._images(self.plan.stages[name])
