"""Open a run folder and check that its config.yaml and checkpoints match the config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpae import config as configs
from openpae.runtime import processes
from openpae.runtime.terminal import note
from openpae.storage.model_folder import RUN_CONFIG, checkpoint_path, checkpoint_steps
from openpae.storage.outputs import check_outputs, make_folder

FREE_FIELDS = (
    *("loop.device", "loop.device_batch_size", "loop.num_workers", "loop.parallel", "loop.profile_steps"),
    *("loop.log_every", "loop.save_every", "loop.keep_last", "loop.keep_every", "loop.evaluate_every"),
    *("loop.track", "loop.count_operations"),
    *("data.evaluation", "data.evaluation_images", "geometry", "extractor", "extractor_weights"),
    *("evaluation_images", "evaluation_samples", "held_out_latents", "tokenizer", "checkpoint_blocks"),
)
"""Fields of hardware, logging, saving and evaluation. They do not change the weights: a run may resume with
other values."""


_WRITTEN = ("checkpoints", "evaluations", "log.jsonl", "profile", "tensorboard", "tracker-id", "wandb")
"""The names that a run writes beside config.yaml."""


def continued(run_dir: Path, config: Any) -> Any:
    """The config with which the run in a folder goes on: with its earlier ends, if it has more steps now.

    Without a folder, or with loop.seconds, the config does not change.
    """
    file = run_dir / "config.yaml"
    if not file.is_file() or config.loop.extended_from or config.loop.seconds is not None:
        return config
    before = configs.load(type(config), file).loop
    if before.steps > config.loop.steps or before.seconds is not None:
        return config
    ends = tuple(end for end in (*before.extended_from, before.steps) if end < config.loop.steps)
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, extended_from=ends))


def check_run(run_dir: Path, config: Any) -> bool:
    """Whether a run folder holds this config. False if it has none, or if `FREE_FIELDS` or more steps differ.

    Raises:
        ValueError: the config of the folder or of its checkpoints differs; the message lists the differences.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        return False
    kept = configs.load(type(config), file)
    changed = configs.differences(kept, config)
    if other := _changing(kept, config):
        raise ValueError(
            f"{run_dir} belongs to a run with another config ({other}); "
            "name another run folder, or pass its own config.yaml to go on"
        )
    for step in reversed(checkpoint_steps(run_dir)):
        copy = checkpoint_path(run_dir, step) / RUN_CONFIG
        try:
            made_with = configs.load(type(config), copy)
        except (OSError, ValueError):  # older versions wrote none; `resume` reports a damaged one
            continue
        if other := _changing(_placeless(made_with), _placeless(config)):
            raise ValueError(
                f"{file} was edited: the checkpoint of step {step} was made with another config ({other}); "
                f"copy {copy} over it, or name another run folder"
            )
        break
    return not changed


def _changing(before: Any, after: Any) -> str:
    """The first five differences that change the weights up to the earlier end, as one text."""
    old, new = ((*config.loop.extended_from, config.loop.steps) for config in (before, after))
    longer = ("loop.steps", "loop.extended_from") if new[: len(old)] == old else ()
    free = tuple(f"{name}:" for name in (*FREE_FIELDS, *longer))
    lines = [line for line in configs.differences(before, after) if not line.startswith(free)]
    return "; ".join(lines[:5])


def _placeless(config: Any) -> Any:
    """The config with all paths equal: a run may move, and `resume` compares data by fingerprint."""
    changes = {
        part.name: _placeless(value) if dataclasses.is_dataclass(value) else Path("path")
        for part in dataclasses.fields(config)
        if dataclasses.is_dataclass(value := getattr(config, part.name)) or isinstance(value, Path)
    }
    return dataclasses.replace(config, **changes)


def open_run(run_dir: Path, config: Any) -> None:
    """Create a run folder with this config, or accept one that has it.

    Call it after the task is built: a missing input must not leave a run folder behind.

    Raises:
        ValueError: as `check_run`; or a new run would replace files of the user, or its folder lies inside
            an input.
    """

    def make() -> None:
        if not check_run(run_dir, config):
            if not (run_dir / "config.yaml").is_file():
                check_outputs(*(run_dir / name for name in _WRITTEN), into=run_dir, inputs=[*_paths(config)])
            else:
                _say_longer(run_dir, config)
            make_folder(run_dir)
            configs.save(config, run_dir / "config.yaml")

    processes.on_rank0(make)


def _say_longer(run_dir: Path, config: Any) -> None:
    """If the steps have grown, print it and append a line to the log."""
    before = configs.load(type(config), run_dir / "config.yaml").loop
    if before.steps == config.loop.steps:
        return
    constant = config.optim.final_lr is None
    rate = (
        "stays constant" if constant else f"falls again from {config.optim.lr:g} to {config.optim.final_lr:g}"
    )
    note(
        f"{run_dir}: {config.loop.steps:,} steps in place of {before.steps:,}; from step {before.steps:,} on "
        f"the learning rate {rate}"
    )
    step = max(checkpoint_steps(run_dir), default=0)
    seen = {"step": step, "images_seen": step * config.loop.global_batch_size}
    with (run_dir / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(seen | {"loop/steps": config.loop.steps}) + "\n")


def _paths(config: Any) -> Iterator[Path]:
    """All paths of a config, nested ones included."""
    for value in vars(config).values():
        if dataclasses.is_dataclass(value):
            yield from _paths(value)
        elif isinstance(value, Path):
            yield value
