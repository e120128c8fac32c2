"""Checkpoints of a run. A save is atomic, a resume verifies checksums, and both work for any number of ranks.

`engine/__init__` says why a resume is exact.

checkpoints/step-N/   a model folder that anyone can load (model.safetensors, config.yaml), and beside it
    state.pt          weights of all players, optimizers, EMA, gradient norms; or with loop.parallel fsdp:
    state/            the same in shards (torch.distributed.checkpoint)
    run.yaml          the config of the run
    checkpoint.json   step, images_seen, fingerprints of the data (inputs), skipped data steps (passed_over),
                      pace with loop.seconds, checksums; a folder without it is ignored
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer

from openpae.engine.ema import Ema
from openpae.engine.health import NonFiniteGuard
from openpae.engine.pace import Pace
from openpae.engine.parallel import gather_full, is_sharded, shard_like, unwrap
from openpae.engine.settings import LoopConfig
from openpae.engine.state_file import fits, optimizer_fault, read_state, require
from openpae.engine.task import Task
from openpae.runtime import processes
from openpae.storage.files import (
    atomic_folder,
    discard,
    file_hash,
    fingerprints_agree,
    read_json,
    remove_folder,
    write_json,
)
from openpae.storage.model_folder import README, RECORD, RUN_CONFIG, checkpoint_path, checkpoint_steps
from openpae.storage.weights import some


@dataclass
class RunState:
    """All that changes during a run."""

    task: Task
    """The players and their optimizers."""
    ema: Ema | None
    """Average of the first player's weights."""
    health: NonFiniteGuard
    """Which updates are skipped; it keeps the mean gradient norms."""
    config: str | None = None
    """Text of the run's config."""
    skipped_data_steps: list[int] = field(default_factory=list)
    """Steps of the data order that rollbacks skip, ascending; `passed_over` in checkpoint.json."""
    pace: Pace = field(default_factory=lambda: Pace(1, None))
    """Position in the schedule."""

    @property
    def exported(self) -> nn.Module:
        """The first player's module."""
        return unwrap(next(iter(self.task.players.values())))

    def exported_weights(self, loop: LoopConfig) -> dict[str, Tensor]:
        """The full weights that a checkpoint exports, averaged or raw. All ranks must call it."""
        averaged = self.ema.average if self.ema is not None and loop.export == "ema" else {}
        return gather_full(self.exported.state_dict() | averaged)


def save(state: RunState, run_dir: Path, step: int, loop: LoopConfig) -> None:
    """Write the checkpoint of a step and remove old ones. All ranks must call it.

    Raises:
        OSError: rank 0 cannot write (DiskFull: no space). Older checkpoints are unchanged.
    """
    weights, content = state.exported_weights(loop), _content(state)
    with _shared_folder(checkpoint_path(run_dir, step), _bytes([weights, content])) as folder:
        if is_sharded(state.exported):
            content["optimizers"] = {name: kept["state"] for name, kept in content["optimizers"].items()}
            save_shards(content, checkpoint_id=folder / "state")
        else:
            processes.on_rank0(lambda: torch.save({"step": step, **content}, folder / "state.pt"))
        processes.on_rank0(lambda: state.task.write(folder, weights))
        if (text := state.config) is not None:
            processes.on_rank0(lambda: (folder / RUN_CONFIG).write_text(text, encoding="utf-8"))
        facts = {
            "step": step,
            "images_seen": step * loop.global_batch_size,
            "inputs": dict(state.task.inputs),
            "passed_over": state.skipped_data_steps,
            **({} if (pace := state.pace.facts()) is None else {"pace": pace}),
            "sha256": _hashes(folder),
        }
        processes.on_rank0(lambda: write_json(folder / "checkpoint.json", facts))
    processes.on_rank0(lambda: remove_old(run_dir, loop, step))


def resume(state: RunState, run_dir: Path) -> int | None:
    """Load the newest complete checkpoint. Returns its step, or None if there is none.

    Raises:
        ValueError: the checkpoint was trained on other data, or a rank does not see the run folder.
    """
    newest = processes.on_rank0(lambda: _newest(run_dir, state.task.inputs))
    if newest is None:
        return None
    step, skipped_data_steps, pace = newest
    folder = checkpoint_path(run_dir, step)
    if processes.any_rank(not folder.is_dir()):
        raise ValueError(
            f"{folder} is not visible to every process; put the run folder on a disk that all machines share"
        )
    if (folder / "state.pt").is_file():
        content = read_state(folder / "state.pt", step)
    else:
        content = _read_shards(state, folder / "state")
    _restore(state, content)
    state.skipped_data_steps = sorted({*state.skipped_data_steps, *skipped_data_steps})
    state.pace.restore(pace)
    return step


def forget_training(run_dir: Path) -> None:
    """Delete the training states of a finished run, most of its size, and keep its models."""
    for step in checkpoint_steps(run_dir):
        folder = checkpoint_path(run_dir, step)
        (folder / "checkpoint.json").unlink(missing_ok=True)  # first: a folder without it is ignored
        (folder / "state.pt").unlink(missing_ok=True)
        shutil.rmtree(folder / "state", ignore_errors=True)


def read_facts(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's checkpoint.json and verify the checksum of every file of weights and state.

    Raises:
        OSError, ValueError: a file is missing or damaged; the message names it.
    """
    facts = read_json(folder / "checkpoint.json")
    kinds = {"step": int, "inputs": dict, "passed_over": list, "sha256": dict}
    wrong = [name for name, kind in kinds.items() if type(facts.get(name)) is not kind]
    if wrong or not all(type(step) is int for step in facts["passed_over"]):
        raise ValueError(f"checkpoint.json has no valid {', '.join(wrong) or 'passed_over'}")
    paths = dict(_state_files(folder))
    files = {name for name, path in paths.items() if path.is_file() and not path.is_symlink()}
    # Open regular files of this folder only: the list may name a device, a pipe or a path outside.
    if unlisted := sorted(files ^ facts["sha256"].keys() | paths.keys() - files):
        raise ValueError(f"checkpoint.json does not list the files of its folder ({some(unlisted)})")
    if folder.name.startswith("step-") and folder.name != checkpoint_path(Path(), facts["step"]).name:
        raise ValueError(f"checkpoint.json belongs to step {facts['step']}")
    for name, digest in facts["sha256"].items():
        if file_hash(folder / name) != digest:
            raise ValueError(f"its checksum is wrong ({name})")
    return facts


def verify_checkpoint(folder: Path) -> None:
    """Call `read_facts` and compare the optimizer state with the weights.

    Raises:
        OSError, ValueError: a file is missing or damaged, or a tensor of the state does not match the
            weights in shape or type; the message names it.
    """
    facts = read_facts(folder)
    if not (folder / "state.pt").is_file():
        return
    content = read_state(folder / "state.pt", facts["step"])
    for player, weights in content["players"].items():
        shapes = {value.shape for value in weights.values()}
        for number, moments in content["optimizers"].get(player, {"state": {}})["state"].items():
            if (shape := moments["exp_avg"].shape) not in shapes:
                raise ValueError(
                    f"state.pt has an optimizer state of {player} ({number}) that fits no weight"
                )
            require(optimizer_fault(moments, torch.empty(shape)), f"optimizer of {player} ({number})")


def _state_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files with a checksum, as (relative name, path): all but the README, the record and the list."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and name not in (README, RECORD, "checkpoint.json"):
            yield name, path


@contextmanager
def _shared_folder(path: Path, size: int) -> Iterator[Path]:
    """`atomic_folder` for all ranks: rank 0 creates the folder and renames it once all ranks have written."""
    with ExitStack() as stack:
        yield processes.on_rank0(lambda: stack.enter_context(atomic_folder(path, size)))
        processes.on_rank0(stack.close)


def _content(state: RunState) -> dict[str, Any]:
    return {
        "players": {name: _trained_state(module) for name, module in state.task.players.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in state.task.optimizers.items()},
        "ema": None if state.ema is None else state.ema.average,
        "health": state.health.norms,
    }


def _bytes(content: Any) -> int:
    """Size of all tensors, nested ones included."""
    if isinstance(content, Tensor):
        return content.numel() * content.itemsize
    parts = content.values() if isinstance(content, Mapping) else content
    return sum(map(_bytes, parts)) if isinstance(content, Mapping | list | tuple) else 0


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of `_state_files`; the files are split over ranks."""
    files = sorted(path for _, path in _state_files(folder))
    own = {
        files[i].relative_to(folder).as_posix(): file_hash(files[i]) for i in processes.rank_slice(len(files))
    }
    return {name: digest for part in processes.gather(own) for name, digest in part.items()}


def remove_old(run_dir: Path, loop: LoopConfig, newest: int) -> None:
    """Remove the checkpoints up to `newest`, a complete one, that `keep_last` and `keep_every` do not keep.

    A resume calls it as well: a kill may have come between a save and this call.
    """
    for step in [step for step in checkpoint_steps(run_dir) if step <= newest][: -loop.keep_last]:
        if not (loop.keep_every and step and step % loop.keep_every == 0):
            remove_folder(checkpoint_path(run_dir, step))


def _newest(run_dir: Path, inputs: Mapping[str, str]) -> tuple[int, list[int], dict[str, Any] | None] | None:
    """Step of the newest complete checkpoint, its skipped data steps, and its pace."""
    for leftover in (run_dir / "checkpoints").glob(".step-*"):  # left by a kill during a save or a removal
        discard(leftover)
    for step in reversed(checkpoint_steps(run_dir)):
        folder = checkpoint_path(run_dir, step)
        try:
            facts = read_facts(folder)
        except (OSError, ValueError) as error:
            warnings.warn(f"checkpoint {folder} is damaged and was skipped: {error}", stacklevel=3)
            continue
        trained_on = facts["inputs"]
        if changed := sorted(
            name
            for name in trained_on.keys() | inputs.keys()
            if not fingerprints_agree(str(trained_on.get(name, "-")), inputs.get(name, "-"))
        ):
            raise ValueError(
                f"{run_dir} was trained with other {', '.join(changed)}: the data that its config names have "
                "changed; restore them or name another run folder"
            )
        return step, facts["passed_over"], facts.get("pace")
    return None


def _read_shards(state: RunState, folder: Path) -> dict[str, Any]:
    """Read what `save_shards` wrote into tensors laid out as those of this run."""
    content = _content(state)
    kept = FileSystemReader(folder).read_metadata().state_dict_metadata
    content["optimizers"] = {
        name: _blank(optimizer, {key for key in kept if key.startswith(f"optimizers.{name}.")}, name)
        for name, optimizer in state.task.optimizers.items()
    }
    players = {key.split(".")[1] for key in kept if key.startswith("health.")}
    content["health"] = {player: torch.zeros(2) for player in players}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
        load(content, checkpoint_id=folder, no_dist=processes.world_size() == 1)
    for name, optimizer in state.task.optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        content["optimizers"][name] = {"state": content["optimizers"][name], "param_groups": groups}
    return content


def _blank(optimizer: Optimizer, kept: set[str], name: str) -> dict[int, dict[str, Tensor]]:
    """Empty AdamW states to read into; weights that have not been stepped yet have none."""
    return {
        number: {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
        for number, weight in enumerate(_weights(optimizer))
        if f"optimizers.{name}.{number}.exp_avg" in kept
    }


@torch.no_grad()
def _restore(state: RunState, content: Mapping[str, Any]) -> None:
    """Load what `_content` returned. Check every tensor first: a wrong shape would crash a fused kernel."""
    players = {name: _trained_state(player) for name, player in state.task.players.items()}
    for name, own in players.items():
        _check_weights(own, content["players"].get(name), name)
    for name, optimizer in state.task.optimizers.items():
        _check_optimizer(optimizer, content["optimizers"].get(name), name)
    if state.ema is not None:
        _check_weights(state.ema.average, content["ema"], "ema")
    norms = {name: norm for name, norm in content["health"].items() if fits(norm, torch.empty(2))}
    require(None if norms.keys() == content["health"].keys() <= players.keys() else "its norms", "health")
    for name, own in players.items():
        _copy(own, content["players"][name])
    for name, optimizer in state.task.optimizers.items():
        weights, groups = _weights(optimizer), optimizer.state_dict()["param_groups"]
        moments = {
            number: {
                key: value
                if key == "step"
                # In the memory layout of the weight: a fused kernel walks both in memory order.
                else torch.empty_like(weights[number]).copy_(shard_like(value, weights[number]))
                for key, value in kept.items()
            }
            for number, kept in content["optimizers"][name]["state"].items()
        }
        # The param groups come from the config, not from the file.
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if state.ema is not None:
        _copy(state.ema.average, content["ema"])
    state.health.norms = {player: norm.to(state.health.device) for player, norm in norms.items()}


def _check_weights(own: Mapping[str, Tensor], kept: Any, label: str) -> None:
    names = kept.keys() if isinstance(kept, Mapping) else set()
    wrong = sorted(own.keys() ^ names)
    wrong += [name for name in own.keys() & names if not fits(kept[name], own[name])]
    require(", ".join(map(str, wrong[:5])) or None, label)


def _check_optimizer(optimizer: Optimizer, kept: Any, player: str) -> None:
    weights = dict(enumerate(_weights(optimizer)))
    states = kept.get("state") if isinstance(kept, Mapping) else None
    label = f"optimizer of {player}"
    require(None if isinstance(states, Mapping) and states.keys() <= weights.keys() else "its numbers", label)
    for number, moments in dict(states or {}).items():
        require(optimizer_fault(moments, weights[number]), f"{label} ({number})")


def _copy(own: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    for name, value in own.items():
        value.copy_(shard_like(kept[name], value))


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _trained_state(player: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters."""
    module = unwrap(player)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}
