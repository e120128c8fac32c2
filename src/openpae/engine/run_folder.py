"""Which config a run folder belongs to: that of its config.yaml, and of its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openpae import config as configs
from openpae.runtime import processes
from openpae.storage.model_folder import RUN_CONFIG, checkpoint_path, checkpoint_steps
from openpae.storage.outputs import check_outputs, make_folder

HARDWARE_FIELDS = (
    *("loop.device", "loop.device_batch_size", "loop.num_workers", "loop.parallel", "loop.profile_steps"),
    "checkpoint_blocks",
)
"""Fields that say how a run is computed, and not what: it may go on with others."""


_WRITTEN = ("checkpoints", "evaluations", "log.jsonl", "profile", "tensorboard")
"""What a run writes beside its config.yaml, without which none of it is a run's."""


def check_run(run_dir: Path, config: Any) -> bool:
    """Whether a run folder already holds this config; False where it holds none, or one that computes the
    same run on other hardware (`HARDWARE_FIELDS`).

    Raises:
        ValueError: the folder belongs to a run with another config, or its checkpoints were made with another
            one; the message lists the differences.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        return False
    changed = configs.differences(configs.load(type(config), file), config)
    if other := _changing(changed):
        raise ValueError(
            f"{run_dir} belongs to a run with another config ({other}); "
            "name another run folder, or pass its own config.yaml to go on"
        )
    for step in reversed(checkpoint_steps(run_dir)):
        kept = checkpoint_path(run_dir, step) / RUN_CONFIG
        try:
            made_with = configs.load(type(config), kept)
        except (OSError, ValueError):  # older versions kept none; `resume` names a damaged one
            continue
        if other := _changing(configs.differences(_placeless(made_with), _placeless(config))):
            raise ValueError(
                f"{file} was edited: the checkpoint of step {step} was made with another config ({other}); "
                f"copy {kept} over it, or name another run folder"
            )
        break
    return not changed


def _changing(differences: Sequence[str]) -> str:
    """Those that change what is computed, as one text."""
    hardware = tuple(f"{name}:" for name in HARDWARE_FIELDS)
    return "; ".join([line for line in differences if not line.startswith(hardware)][:5])


def _placeless(config: Any) -> Any:
    """The config without its paths: a run may move, and `resume` compares the data by fingerprint."""
    changes = {
        part.name: _placeless(value) if dataclasses.is_dataclass(value) else Path("path")
        for part in dataclasses.fields(config)
        if dataclasses.is_dataclass(value := getattr(config, part.name)) or isinstance(value, Path)
    }
    return dataclasses.replace(config, **changes)


def open_run(run_dir: Path, config: Any) -> None:
    """Make a run folder that holds this config, or accept one that already does.

    Call it once the task stands: a path that is not there must not leave a run folder behind.

    Raises:
        ValueError: see `check_run`; or a new run's folder holds files of the user that it would replace, or
            lies in what the run reads.
    """

    def make() -> None:
        if not check_run(run_dir, config):
            if not (run_dir / "config.yaml").is_file():
                check_outputs(*(run_dir / name for name in _WRITTEN), into=run_dir, inputs=[*_paths(config)])
            make_folder(run_dir)
            configs.save(config, run_dir / "config.yaml")

    processes.on_rank0(make)


def _paths(config: Any) -> Iterator[Path]:
    """All that a config names, however nested."""
    for value in vars(config).values():
        if dataclasses.is_dataclass(value):
            yield from _paths(value)
        elif isinstance(value, Path):
            yield value
