"""What the training state of a checkpoint, state.pt, may hold.

A file with the right checksum may still be made by hand. Whatever would crash a fused kernel, or turn weights
to NaN some steps later, is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpae.storage.weights import read_tensors


def read_state(file: Path, step: int) -> dict[str, Any]:
    """Read a training state and check all that does not depend on the run.

    Args:
        file: state.pt of a checkpoint.
        step: the step of the checkpoint.

    Returns:
        step; players, player -> weights; optimizers, player -> {"state": moments of each weight, ...}; ema,
        weights or None; health, player -> two gradient norms.

    Raises:
        ValueError: no training state of this step, or a value that no training can have.
    """
    content = read_tensors(file)
    kinds = {"step": int, "players": dict, "optimizers": dict, "health": dict}
    kinds["ema"] = type(content.get("ema")) if isinstance(content.get("ema"), dict | None) else dict
    if wrong := [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]:
        raise ValueError(f"{file} is no training state: it has no valid {', '.join(sorted(wrong))}")
    if content["step"] is True or content["step"] != step:
        raise ValueError(f"{file} is the training state of step {content['step']}, not of step {step}")
    if fault := next(_faults(content, step), None):
        raise ValueError(f"{file} is no training state: {fault}; take another checkpoint")
    return content


def _faults(content: Mapping[str, Any], step: int) -> Iterator[str]:
    """What is wrong in a training state, part after part."""
    for player, weights in content["players"].items():
        yield from _weight_faults(weights, f"the weights of {player}")
    yield from _weight_faults(content["ema"] or {}, "the weights of ema")
    for player, kept in content["optimizers"].items():
        label = f"the optimizer of {player}"
        states = kept.get("state") if isinstance(kept, Mapping) else None
        if not isinstance(states, Mapping) or not all(type(number) is int for number in states):
            yield f"{label} has no states by number"
        else:
            for number, moments in states.items():
                yield from _moment_faults(moments, f"{label} ({number})", step)
    for player, norms in content["health"].items():
        if not fits(norms, torch.empty(2)) or not (norms >= 0).all() or not norms.isfinite().all():
            yield f"health of {player} must be two finite norms >= 0"


def _weight_faults(weights: Any, label: str) -> Iterator[str]:
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        yield f"{label} must be tensors by name"
        return
    for name, value in weights.items():
        if not fits(value, None):
            yield f"{label} must be tensors by name, got {type(value).__name__} for {name!r}"
        elif not value.isfinite().all():
            yield f"{label} hold NaN or infinity ({name!r})"


def _moment_faults(moments: Any, label: str, step: int) -> Iterator[str]:
    if fault := optimizer_fault(moments, None):
        yield f"{label} does not match the config: {fault}"
    elif not (moments["exp_avg"].is_floating_point() and moments["exp_avg_sq"].is_floating_point()):
        return  # the comparison with the weight names them
    elif not 0 <= moments["step"] <= step:  # false for NaN
        yield f"{label} counts {moments['step'].item():g} updates in {step} steps"
    elif not (moments["exp_avg"].isfinite().all() and moments["exp_avg_sq"].isfinite().all()):
        yield f"{label} holds NaN or infinity"
    elif (moments["exp_avg_sq"] < 0).any():
        yield f"{label} has a mean square below 0"


def optimizer_fault(moments: Any, weight: Tensor | None) -> str | None:
    """The names of an AdamW state that do not fit its weight, or None. Without a weight any shape fits."""
    likes = {"step": torch.empty((), dtype=torch.float32), "exp_avg": weight, "exp_avg_sq": weight}
    if not isinstance(moments, Mapping) or moments.keys() != likes.keys():
        return "its names"
    wrong = [name for name, like in likes.items() if not fits(moments[name], like)]
    return ", ".join(wrong) or None


def fits(kept: Any, own: Tensor | None) -> bool:
    """Whether a tensor of a file has a dense layout, and the shape and dtype of the run's tensor if given."""
    return (
        isinstance(kept, Tensor)
        and (own is None or (kept.shape, kept.dtype) == (own.shape, own.dtype))
        and kept.layout == torch.strided
        and kept.device.type != "meta"
    )


def require(fault: str | None, label: str) -> None:
    """Raise ValueError for a fault of a part of a checkpoint."""
    if fault:
        raise ValueError(
            f"the checkpoint's {label} does not match the config: {fault}; the checkpoint is damaged, or was "
            "made by another version or with another encoder"
        )
