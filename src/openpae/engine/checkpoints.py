"""Checkpoints of a run: written whole or not at all, checked before they are trusted, for any number of
processes.

checkpoints/step-N/   a model folder that anyone can load, and beside it
    state.pt          all that is needed to go on; or, where it was cut into shards (loop.parallel fsdp),
    state/            the same as every process had it (torch.distributed.checkpoint)
    run.yaml          the config of the run, as it was when the run was started
    checkpoint.json   step, fingerprints of the data, checksums; without it the checkpoint does not count
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
from openpae.engine.task import Task
from openpae.runtime import processes
from openpae.storage.files import (
    atomic_folder,
    file_hash,
    fingerprints_agree,
    read_json,
    remove_folder,
    write_json,
)
from openpae.storage.model_folder import README, RECORD, RUN_CONFIG, checkpoint_path, checkpoint_steps
from openpae.storage.weights import read_tensors, some


@dataclass
class RunState:
    """All that changes while a run goes on."""

    task: Task
    """Its players and their optimizers."""
    ema: Ema | None
    """Average of the first player's weights."""
    health: NonFiniteGuard
    """Its mean gradient norms."""
    config: str | None = None
    """Text of the run's config, for its checkpoints."""
    skipped_data_steps: list[int] = field(default_factory=list)
    """Steps of the data order that the run has gone past, in order."""
    pace: Pace = field(default_factory=lambda: Pace(1, None))
    """Where the schedule stands."""

    @property
    def exported(self) -> nn.Module:
        """The first player's module."""
        return unwrap(next(iter(self.task.players.values())))

    def exported_weights(self, loop: LoopConfig) -> dict[str, Tensor]:
        """What a checkpoint offers for use: averaged or raw weights, whole. Every process has to ask."""
        averaged = self.ema.average if self.ema is not None and loop.export == "ema" else {}
        return gather_full(self.exported.state_dict() | averaged)


def save(state: RunState, run_dir: Path, step: int, loop: LoopConfig) -> None:
    """Write the checkpoint of a step, and remove those that need not be kept. Every process takes part.

    Raises:
        OSError: the first process cannot write; the checkpoints before are as they were.
        DiskFull: there is no room for it; the same.
    """
    weights, content = state.exported_weights(loop), _content(state)
    with _folder_of_all(checkpoint_path(run_dir, step), _bytes([weights, content])) as folder:
        if is_sharded(state.exported):
            content["optimizers"] = {name: held["state"] for name, held in content["optimizers"].items()}
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
    """Load the newest sound checkpoint; returns the step to go on from, None where there is none.

    Raises:
        ValueError: it was trained on other data, or not all processes see the run's folder.
    """
    found = processes.on_rank0(lambda: _newest(run_dir, state.task.inputs))
    if found is None:
        return None
    step, skipped_data_steps, pace = found
    folder = checkpoint_path(run_dir, step)
    if processes.any_rank(not folder.is_dir()):
        raise ValueError(
            f"{folder} is not there for every process; the run folder must lie on a disk that all machines "
            "share"
        )
    if (folder / "state.pt").is_file():
        content = _read_state(folder / "state.pt", step)
    else:
        content = _read_shards(state, folder / "state")
    _restore(state, content)
    state.skipped_data_steps = sorted({*state.skipped_data_steps, *skipped_data_steps})
    state.pace.restore(pace)
    return step


def forget_training(run_dir: Path) -> None:
    """Keep of a run that is over its models alone. The rest, most of its size, is there to go on with it."""
    for step in checkpoint_steps(run_dir):
        folder = checkpoint_path(run_dir, step)
        (folder / "checkpoint.json").unlink(missing_ok=True)  # first: without it no checkpoint counts
        (folder / "state.pt").unlink(missing_ok=True)
        shutil.rmtree(folder / "state", ignore_errors=True)


def read_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint's checkpoint.json says, once every file has the checksum in it.

    Raises:
        OSError, ValueError: a file is missing or damaged; the message names it.
    """
    facts = read_json(folder / "checkpoint.json")
    kinds = {"step": int, "inputs": dict, "passed_over": list, "sha256": dict}
    wrong = [name for name, kind in kinds.items() if type(facts.get(name)) is not kind]
    if wrong or not all(type(step) is int for step in facts["passed_over"]):
        raise ValueError(f"checkpoint.json has no fitting {', '.join(wrong) or 'passed_over'}")
    kept = {name for name, path in _inside(folder) if path.is_file() and not path.is_symlink()}
    # Nothing else is opened: a list may name a device, a pipe or a file of somebody else.
    if strange := sorted(kept ^ facts["sha256"].keys() | {name for name, path in _inside(folder)} - kept):
        raise ValueError(f"checkpoint.json does not list its files ({some(strange)})")
    if folder.name.startswith("step-") and folder.name != checkpoint_path(Path(), facts["step"]).name:
        raise ValueError(f"checkpoint.json is that of step {facts['step']}")
    for name, digest in facts["sha256"].items():
        if file_hash(folder / name) != digest:
            raise ValueError(f"its checksum is wrong ({name})")
    return facts


def verify_checkpoint(folder: Path) -> None:
    """`read_facts`, and see that the training state fits its own weights.

    Raises:
        OSError, ValueError: a file is missing or damaged, or a tensor of the state has another shape or type
            than the weights; the message names it.
    """
    facts = read_facts(folder)
    if not (folder / "state.pt").is_file():
        return
    content = _read_state(folder / "state.pt", facts["step"])
    for player, weights in content["players"].items():
        shapes = {value.shape for value in weights.values() if isinstance(value, Tensor)}
        for number, held in dict(content["optimizers"].get(player, {}).get("state", {})).items():
            shape = getattr(held.get("exp_avg"), "shape", None) if isinstance(held, Mapping) else None
            if shape not in shapes:
                raise ValueError(
                    f"state.pt holds an optimizer state of {player} ({number}) that fits no weight"
                )
            _require(_optimizer_fault(held, torch.empty(shape)), f"optimizer of {player} ({number})")


def _inside(folder: Path) -> Iterator[tuple[str, Path]]:
    """What a checkpoint holds, by name, but for what does not belong to the training state."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and name not in (README, RECORD, "checkpoint.json"):
            yield name, path


@contextmanager
def _folder_of_all(path: Path, wanted: int) -> Iterator[Path]:
    """`atomic_folder` for all processes: the first makes it, and renames it when all have written."""
    with ExitStack() as stack:
        yield processes.on_rank0(lambda: stack.enter_context(atomic_folder(path, wanted)))
        processes.on_rank0(stack.close)


def _content(state: RunState) -> dict[str, Any]:
    return {
        "players": {name: _trained_state(module) for name, module in state.task.players.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in state.task.optimizers.items()},
        "ema": None if state.ema is None else state.ema.average,
        "health": state.health.norms,
    }


def _bytes(content: Any) -> int:
    """Of all tensors in it, however nested."""
    if isinstance(content, Tensor):
        return content.numel() * content.itemsize
    parts = content.values() if isinstance(content, Mapping) else content
    return sum(map(_bytes, parts)) if isinstance(content, Mapping | list | tuple) else 0


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint but its README; each process reads its share."""
    files = sorted(path for _, path in _inside(folder))
    own = {
        files[i].relative_to(folder).as_posix(): file_hash(files[i]) for i in processes.rank_slice(len(files))
    }
    return {name: digest for part in processes.gather(own) for name, digest in part.items()}


def remove_old(run_dir: Path, loop: LoopConfig, newest: int) -> None:
    """Remove what `keep_last` and `keep_every` do not keep of the checkpoints up to a sound one, `newest`.

    Also done where a run goes on: a kill may have come between a save and this.
    """
    for step in [step for step in checkpoint_steps(run_dir) if step <= newest][: -loop.keep_last]:
        if not (loop.keep_every and step and step % loop.keep_every == 0):
            remove_folder(checkpoint_path(run_dir, step))


def _newest(run_dir: Path, inputs: Mapping[str, str]) -> tuple[int, list[int], dict[str, Any] | None] | None:
    """Step of the newest sound checkpoint, the data that it went past, and its pace."""
    for leftover in (run_dir / "checkpoints").glob(".step-*"):  # of a kill while one was written or removed
        shutil.rmtree(leftover)
    for step in reversed(checkpoint_steps(run_dir)):
        folder = checkpoint_path(run_dir, step)
        try:
            facts = read_facts(folder)
        except (OSError, ValueError) as error:
            warnings.warn(f"checkpoint {folder} is damaged and was passed over: {error}", stacklevel=3)
            continue
        trained_on = facts["inputs"]
        if changed := sorted(
            name
            for name in trained_on.keys() | inputs.keys()
            if not fingerprints_agree(str(trained_on.get(name, "-")), inputs.get(name, "-"))
        ):
            raise ValueError(
                f"{run_dir} was trained with other {', '.join(changed)}: what its config "
                "names has changed since; bring it back or name another run folder"
            )
        return step, facts["passed_over"], facts.get("pace")
    return None


def _read_state(file: Path, step: int) -> dict[str, Any]:
    content = read_tensors(file)
    kinds = {"step": int, "players": dict, "optimizers": dict, "health": dict}
    kinds["ema"] = type(content.get("ema")) if isinstance(content.get("ema"), dict | None) else dict
    if wrong := [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]:
        raise ValueError(f"{file} is no training state: it has no fitting {', '.join(sorted(wrong))}")
    if content["step"] != step:
        raise ValueError(f"{file} is the training state of step {content['step']}, not of step {step}")
    return content


def _read_shards(state: RunState, folder: Path) -> dict[str, Any]:
    """What `save_shards` wrote, each process's part or all, whichever its own tensors are."""
    content = _content(state)
    kept = FileSystemReader(folder).read_metadata().state_dict_metadata
    content["optimizers"] = {
        name: _blank(optimizer, {key for key in kept if key.startswith(f"optimizers.{name}.")}, name)
        for name, optimizer in state.task.optimizers.items()
    }
    players = {key.split(".")[1] for key in kept if key.startswith("health.")}
    content["health"] = {player: torch.zeros(2) for player in players}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # what no_dist asks for
        load(content, checkpoint_id=folder, no_dist=processes.world_size() == 1)
    for name, optimizer in state.task.optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        content["optimizers"][name] = {"state": content["optimizers"][name], "param_groups": groups}
    return content


def _blank(optimizer: Optimizer, kept: set[str], name: str) -> dict[int, dict[str, Tensor]]:
    """Tensors for the optimizer's state to be read into; a player that has not stepped yet has none."""
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
    """Load what `_content` gave, once all of it is seen to fit: a wrong shape would crash a fused kernel."""
    players = {name: _trained_state(player) for name, player in state.task.players.items()}
    for name, own in players.items():
        _check_weights(own, content["players"].get(name), name)
    for name, optimizer in state.task.optimizers.items():
        _check_optimizer(optimizer, content["optimizers"].get(name), name)
    if state.ema is not None:
        _check_weights(state.ema.average, content["ema"], "ema")
    norms = {name: norm for name, norm in content["health"].items() if _fits(norm, torch.empty(2))}
    _require(None if norms.keys() == content["health"].keys() <= players.keys() else "its norms", "health")
    for name, own in players.items():
        _copy(own, content["players"][name])
    for name, optimizer in state.task.optimizers.items():
        weights, groups = _weights(optimizer), optimizer.state_dict()["param_groups"]
        moments = {
            number: {
                key: value
                if key == "step"
                # In the layout of the weight: a fused kernel goes through both in the order of their memory.
                else torch.empty_like(weights[number]).copy_(shard_like(value, weights[number]))
                for key, value in held.items()
            }
            for number, held in content["optimizers"][name]["state"].items()
        }
        # The groups are the config's: what a file says of betas and kernels is not asked.
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if state.ema is not None:
        _copy(state.ema.average, content["ema"])
    state.health.norms = {player: norm.to(state.health.device) for player, norm in norms.items()}


def _check_weights(own: Mapping[str, Tensor], kept: Any, what: str) -> None:
    names = kept.keys() if isinstance(kept, Mapping) else set()
    strange = sorted(own.keys() ^ names)
    strange += [name for name in own.keys() & names if not _fits(kept[name], own[name])]
    _require(", ".join(map(str, strange[:5])) or None, what)


def _check_optimizer(optimizer: Optimizer, kept: Any, player: str) -> None:
    weights = dict(enumerate(_weights(optimizer)))
    held = kept.get("state") if isinstance(kept, Mapping) else None
    what = f"optimizer of {player}"
    _require(None if isinstance(held, Mapping) and held.keys() <= weights.keys() else "its numbers", what)
    for number, moments in dict(held or {}).items():
        _require(_optimizer_fault(moments, weights[number]), f"{what} ({number})")


def _optimizer_fault(moments: Any, weight: Tensor) -> str | None:
    """What of an AdamW state does not fit its weight."""
    wanted = {"step": torch.empty((), dtype=torch.float32), "exp_avg": weight, "exp_avg_sq": weight}
    if not isinstance(moments, Mapping) or moments.keys() != wanted.keys():
        return "its names"
    strange = [name for name, like in wanted.items() if not _fits(moments[name], like)]
    return ", ".join(strange) or None


def _fits(kept: Any, own: Tensor) -> bool:
    """Whether a tensor of a file has the shape, type and layout of ours."""
    return (
        isinstance(kept, Tensor)
        and (kept.shape, kept.dtype, kept.layout) == (own.shape, own.dtype, torch.strided)
        and kept.device.type != "meta"
    )


def _require(fault: str | None, what: str) -> None:
    if fault:
        raise ValueError(
            f"the checkpoint's {what} does not hold what the config asks for: {fault}; it is damaged, or of "
            "another version or another encoder"
        )


def _copy(own: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    for name, value in own.items():
        value.copy_(shard_like(kept[name], value))


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _trained_state(player: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters, which come from elsewhere."""
    module = unwrap(player)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}
