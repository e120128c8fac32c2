"""What the quickstart trains, for how long, and what it needs at the least."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openpae import config as configs
from openpae.quickstart.workers import Speed, Workers
from openpae.storage.files import read_json, write_json
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

Run = TypeVar("Run", RefinerRun, TokenizerRun, GeneratorRun)

LEAST_STEPS = {"refiner": 60, "tokenizer": 100, "generator": 300}
"""Steps below which nothing of use is expected. The tokenizer's is measured (docs/results.md, "Beginning from
patches"). Of the generator it is known that 140 steps give noise and 1,060 outlines."""

_AROUND = 650
"""What is neither training nor rendering (features, latents, samples, metrics), in steps of the tokenizer.
A quiet 12 minutes had 180 s of it at 0.17 s a step (docs/results.md); shorter ones render and sample less."""

_SHARES = {"refiner": 0.04, "tokenizer": 0.6, "generator": 0.95}
"""Share of the time then left for training that each stage takes."""


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


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What the machine can do, and the time that the whole line is given."""

    workers: Workers
    seconds: float


def least_seconds(speed: Speed) -> float:
    """Time of the whole line with the fewest steps that are of use."""
    tokenizer = _AROUND + LEAST_STEPS["refiner"] + LEAST_STEPS["tokenizer"]
    return tokenizer * speed.tokenizer + LEAST_STEPS["generator"] * speed.generator


def settle(
    speeds: list[Speed], budget: float, *, spent: float = 0.0, strict: bool
) -> tuple[Timing, list[str]]:
    """Choose the workers and the time, and say why.

    Args:
        speeds: of all candidates, the quickest first.
        budget: seconds that were asked for.
        spent: seconds of them that are gone.
        strict: refuse where the budget does not pay for the fewest steps.

    Returns:
        The choice, and lines for the terminal.

    Raises:
        ValueError: strict, and the budget is too short.
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
        f"below which nothing of use comes out, make it about {needed / 60:.0f} min here now"
    )
    if strict:
        raise ValueError(
            f"the budget of {budget / 60:g} min is too short: {short}; give --budget "
            f"{needed / 60 + 0.5:.0f}min, or leave out --strict-budget"
        )
    lines.append(f"the budget of {budget / 60:g} min is too short: {short}; going on for that long")
    return Timing(workers=best.workers, seconds=needed), lines


def read_timing(file: Path) -> Timing | None:
    """What `write_timing` kept, or None."""
    if not file.is_file():
        return None
    kept = read_json(file)
    return Timing(workers=Workers(**kept["workers"]), seconds=kept["seconds"])


def write_timing(file: Path, timing: Timing, speeds: list[Speed]) -> None:
    """Keep the choice, so that an interrupted quickstart goes on with it."""
    write_json(file, dataclasses.asdict(timing) | {"timed": [dataclasses.asdict(speed) for speed in speeds]})


def refiner_run(out: Path, seed: int) -> RefinerRun:
    """The refiner, but for its time."""
    run = configs.load(RefinerRun, "refiner/quickstart")
    return _changed(run, seed, data=_replaced(run.data, images=out / "data" / "train", **_cache(out)))


def tokenizer_run(out: Path, seed: int) -> TokenizerRun:
    """The tokenizer, but for its time."""
    run = configs.load(TokenizerRun, "tokenizer/quickstart")
    images = {"images": out / "data" / "train", "evaluation": out / "data" / "held-out"}
    return _changed(run, seed, prior=out / "refiner", data=_replaced(run.data, **images, **_cache(out)))


def generator_run(out: Path, seed: int) -> GeneratorRun:
    """The generator, but for its time."""
    run = configs.load(GeneratorRun, "generator/quickstart")
    latents = {"latents": out / "latents" / "train", "held_out_latents": out / "latents" / "held-out"}
    return _changed(run, seed, **latents)


def timed(run: Run, name: str, left: float, *, trial: bool) -> Run:
    """The run with its share of the seconds that are left for training.

    Args:
        run: any stage's.
        name: of the stage.
        left: seconds left for this stage and those after it.
        trial: no fewest number of steps.
    """
    least = 1 if trial else min(LEAST_STEPS[name], run.loop.steps)
    loop = dataclasses.replace(run.loop, seconds=max(1.0, _SHARES[name] * left), least_steps=least)
    return dataclasses.replace(run, loop=loop)


def _cache(out: Path) -> dict[str, Any]:
    return {"feature_cache": out / "features"}


def _replaced(part: Any, **changes: Any) -> Any:
    return dataclasses.replace(part, **changes)


def _changed(run: Run, seed: int, **changes: Any) -> Run:
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, seed=seed), **changes)
