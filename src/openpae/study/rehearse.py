"""Estimate how long a plan takes, from finished stages or from small trial runs of the same stages."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from openpae.data.images import open_images
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
    read_stage,
    settings_of,
)
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

TRAINING = (RefinerRun, TokenizerRun, GeneratorRun)
_STEPS, _IMAGES = (4, 12), (16, 48)
"""The two sizes of a trial run: optimizer steps, and images or samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a stage."""

    seconds: float
    rehearsed: bool
    """Whether it comes from a trial run and not from finished stages."""


def estimates(
    plan: Plan, *, rehearse: bool = False, log: Callable[[str], None] = lambda _: None
) -> dict[str, Estimate]:
    """Estimate the seconds of the stages that are not done.

    Stages of one kind that differ only in seed, steps and inputs are assumed to be equally fast. Their time
    per unit (step, or stage) is the mean over the finished stages below OUT.

    Args:
        plan: the plan.
        rehearse: run the other stages at two small sizes in a temporary folder, and extrapolate linearly.
            This also shows that every stage runs. By default they are left out.
        log: called with a line for each trial run.
    """
    open_stages = [stage for stage in plan.stages.values() if not plan.layout.record(stage.id).is_file()]
    rates = _rates(plan.layout.out / "stages")
    known = {
        stage.id: Estimate(seconds=rates[key] * _steps(stage.settings), rehearsed=False)
        for stage in open_stages
        if (key := _speed_key(stage.kind, settings_of(stage.settings), dict(stage.inputs))) in rates
    }
    if rehearse and (left := [stage for stage in open_stages if stage.id not in known]):
        with tempfile.TemporaryDirectory(prefix="pae-study-") as scratch:
            known |= _Rehearsal(plan, Path(scratch), log).estimates(left)
    return known


def _rates(folder: Path) -> dict[str, float]:
    """Return seconds per step (or per stage without steps) for each kind of finished stage."""
    times: dict[str, list[float]] = {}
    for file in sorted(folder.glob("*.json")):
        record = read_stage(file)
        key = _speed_key(record["stage"], record["settings"], record["inputs"])
        times.setdefault(key, []).append(
            record["seconds"] / record["settings"].get("loop", {}).get("steps", 1)
        )
    return {key: mean(values) for key, values in times.items()}


def _speed_key(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return a key that is equal for stages with equal time per unit."""
    plain = json.loads(json.dumps(settings))
    plain.pop("step", None)
    if "loop" in plain:
        for name in ("seed", "steps", "save_every", "keep_last", "keep_every", "log_every"):
            plain["loop"].pop(name, None)
    # The time of a cache depends on the number of images, which the input determines.
    images = inputs.get("images") if "loop" not in plain else None
    return json.dumps([kind, plain, images], sort_keys=True)


def _steps(settings: Any) -> int:
    return settings.loop.steps if isinstance(settings, TRAINING) else 1


def _sizes(stage: Stage) -> tuple[int, int]:
    return _STEPS if isinstance(stage.settings, TRAINING) else _IMAGES


class _Rehearsal:
    """Trial runs: small copies of stages in a temporary folder."""

    def __init__(self, plan: Plan, scratch: Path, log: Callable[[str], None]) -> None:
        self.plan, self.log = plan, log
        self.layout = dataclasses.replace(plan.layout, out=scratch)

    def estimates(self, stages: Iterable[Stage]) -> dict[str, Estimate]:
        """Estimate stages from trial runs."""
        lines: dict[str, tuple[float, float]] = {}
        seconds = {}
        for stage in stages:
            key = _speed_key(stage.kind, settings_of(stage.settings), dict(stage.inputs))
            if key not in lines:
                self.log(f"rehearsing {stage.kind}: {stage.label}")
                lines[key] = self._line(stage)
            start, slope = lines[key]
            seconds[stage.id] = Estimate(seconds=start + slope * self._units(stage), rehearsed=True)
        return seconds

    def _line(self, stage: Stage) -> tuple[float, float]:
        """Return the seconds at zero units, and per unit."""
        small, large = _sizes(stage)
        self._small(stage, large)  # so that no input is made while the stage is timed
        self._small(stage, small)
        if isinstance(stage.settings, MeasureStage | JudgeStage):
            self._do(stage, small - 1)  # loads the networks that all such stages of a process share
        first, second = (float(self._do(stage, units)["seconds"]) for units in (small, large))
        slope = max(0.0, (second - first) / (large - small))
        return max(0.0, second - slope * large), slope

    def _do(self, stage: Stage, units: int) -> dict[str, Any]:
        return run_stage(self._small(stage, units), self.layout, commit="", quiet=True)

    def _small(self, stage: Stage, units: int) -> Stage:
        """Return a small copy of a stage whose inputs are done."""
        # Cached features and latents have one row per image.
        cached = isinstance(stage.settings, FeatureSettings | LatentSettings)
        inputs = tuple(
            (role, self._id(name, units if cached and role != "tokenizer" else None))
            for role, name in stage.inputs
        )
        return dataclasses.replace(stage, settings=self._shrunk(stage, units), inputs=inputs)

    def _id(self, name: str, units: int | None) -> str:
        """Return the id of a root, or run a small copy of a stage and return its id."""
        if name in self.layout.roots:
            return name
        stage = self.plan.stages[name]
        small = self._small(stage, units or _sizes(stage)[1])
        run_stage(small, self.layout, commit="", quiet=True)
        return small.id

    def _shrunk(self, stage: Stage, units: int) -> Any:
        """Return the settings of a stage at another size."""
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
            full = settings.settings
            share = units / full.metrics.count
            metrics = dataclasses.replace(
                full.metrics, count=units, lpc_count=max(1, round(full.metrics.lpc_count * share))
            )
            labels = max(1, round(full.label_count * share))
            return dataclasses.replace(
                settings, settings=dataclasses.replace(full, metrics=metrics, label_count=labels)
            )
        if isinstance(settings, JudgeStage):
            fewer = dataclasses.replace(settings.settings, samples=units)
            return dataclasses.replace(settings, settings=fewer, step=_STEPS[1])
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
        """Return the number of images of a stage's source, after `every`."""
        inputs = dict(stage.inputs)
        if "images" not in inputs:  # reconstructions of latents
            return self._images(self.plan.stages[inputs["latents"]])
        name = inputs["images"]
        if name in self.plan.layout.roots:
            every = stage.settings.every if isinstance(stage.settings, PackSettings) else 1
            return len(range(0, len(open_images(self.plan.layout.folder(name))), every))
        return self._images(self.plan.stages[name])
