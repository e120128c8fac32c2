"""Configs and times of the quickstart's stages."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openpae import config as configs
from openpae.quickstart.workers import Speed, Workers
from openpae.storage.files import read_fields, write_json
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

Run = TypeVar("Run", RefinerRun, TokenizerRun, GeneratorRun)

LEAST_STEPS = {"refiner": 60, "tokenizer": 100, "generator": 2000}
"""Fewest steps for a usable result (docs/results.md, "Beginning from patches" and "Steps of the quickstart's
generator"). 1,500 steps of the generator are measured to be too few."""

_AROUND = 650
"""Time of features, latents, samples and metrics, in steps of the tokenizer. An undisturbed run of 12 minutes
took 180 s for them at 0.17 s per step (docs/results.md); shorter runs sample less."""

_SHARES = {"refiner": 0.04, "tokenizer": 0.18, "generator": 0.95}
"""Share of the remaining training time for each stage. A tokenizer that begins from patches needs little."""


def parse_budget(text: str) -> float:
    """Return the seconds of a duration such as "200s", "12min" or "2h".

    Raises:
        ValueError: the text is no duration, or is outside of 3 minutes to 1,000 hours.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h)", text.strip())
    if not match:
        raise ValueError(f"budget must be a number and s, min or h (12min, 2h), got {text!r}")
    seconds = float(match[1]) * {"s": 1, "min": 60, "m": 60, "h": 3600}[match[2]]
    if seconds < 180:
        raise ValueError(
            f"budget must be at least 3min, got {text!r}; preparing and measuring alone take half of that"
        )
    if seconds > 3_600_000:
        raise ValueError(f"budget must be at most 1000h, got {text[:20]!r}")
    return seconds


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The chosen workers, and the total time in seconds."""

    workers: Workers
    seconds: float


def least_seconds(speed: Speed) -> float:
    """Return the total time with the fewest useful steps."""
    tokenizer = _AROUND + LEAST_STEPS["refiner"] + LEAST_STEPS["tokenizer"]
    return tokenizer * speed.tokenizer + LEAST_STEPS["generator"] * speed.generator


def settle(
    speeds: list[Speed], budget: float, *, spent: float = 0.0, strict: bool
) -> tuple[Timing, list[str]]:
    """Choose the workers and the total time.

    Args:
        speeds: speeds of all candidates, fastest first.
        budget: requested total time in seconds.
        spent: seconds that have passed.
        strict: raise if the budget is too short for the fewest steps.

    Returns:
        The choice, and lines for the terminal.

    Raises:
        ValueError: strict is set, and the budget is too short.
    """
    lines = [
        f"{speed.workers}: {speed.tokenizer:.2f} s a step of the tokenizer, {speed.generator:.2f} s of the "
        "generator"
        for speed in speeds
    ]
    best, needed = speeds[0], spent + least_seconds(speeds[0])
    lines.append(f"taking {best.workers}")
    if needed <= budget:
        return Timing(workers=best.workers, seconds=budget), lines
    short = (
        f"{LEAST_STEPS['tokenizer']} steps of the tokenizer and {LEAST_STEPS['generator']} of the generator, "
        f"the fewest for a usable result, take about {needed / 60:.0f} min on this machine"
    )
    if strict:
        raise ValueError(
            f"the budget of {budget / 60:g} min is too short: {short}; give --budget "
            f"{needed / 60 + 0.5:.0f}min, or leave out --strict-budget"
        )
    lines.append(f"the budget of {budget / 60:g} min is too short: {short}; going on for that long")
    return Timing(workers=best.workers, seconds=needed), lines


def read_timing(file: Path) -> Timing | None:
    """Read the file of `write_timing`; None if there is none."""
    if not file.is_file():
        return None
    data = read_fields(file, workers=dict, seconds=float)
    return Timing(workers=configs.from_dict(Workers, data["workers"]), seconds=data["seconds"])


def write_timing(file: Path, timing: Timing, speeds: list[Speed]) -> None:
    """Save the choice for an interrupted quickstart that resumes."""
    write_json(file, dataclasses.asdict(timing) | {"timed": [dataclasses.asdict(speed) for speed in speeds]})


def refiner_run(out: Path, seed: int) -> RefinerRun:
    """Return the refiner's config without its time."""
    run = configs.load(RefinerRun, "refiner/quickstart")
    data = dataclasses.replace(run.data, images=out / "data" / "train", feature_cache=out / "features")
    return _with(run, seed, data=data)


def tokenizer_run(out: Path, seed: int) -> TokenizerRun:
    """Return the tokenizer's config without its time."""
    run = configs.load(TokenizerRun, "tokenizer/quickstart")
    train, held_out = out / "data" / "train", out / "data" / "held-out"
    data = dataclasses.replace(run.data, images=train, evaluation=held_out, feature_cache=out / "features")
    return _with(run, seed, prior=out / "refiner", data=data)


def generator_run(out: Path, seed: int) -> GeneratorRun:
    """Return the generator's config without its time."""
    run = configs.load(GeneratorRun, "generator/quickstart")
    latents = out / "latents"
    return _with(run, seed, latents=latents / "train", held_out_latents=latents / "held-out")


def timed(run: Run, name: str, left: float, *, trial: bool) -> Run:
    """Give a run its share of the remaining training time.

    Args:
        run: config of the stage.
        name: name of the stage.
        left: seconds left for this stage and the later ones.
        trial: allow fewer steps than `LEAST_STEPS`.
    """
    least = 1 if trial else min(LEAST_STEPS[name], run.loop.steps)
    loop = dataclasses.replace(run.loop, seconds=max(1.0, _SHARES[name] * left), least_steps=least)
    return dataclasses.replace(run, loop=loop)


def _with(run: Run, seed: int, **changes: Any) -> Run:
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, seed=seed), **changes)
