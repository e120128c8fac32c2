"""Read weight files without running code in them, and load state dicts strictly."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_tensors(file: Path) -> dict[str, Any]:
    """Tensors of a file of any origin: safetensors, or a pickle of plain data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or a pickle that would run code; nothing in it was run.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no weights file at {file}")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown pickle protocols, which raise too
            # Mapped: a training checkpoint is mostly optimizer state, which is not read.
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        oversized = _oversized(data)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(pickle_refusal(file, error)) from None
    except Exception as error:  # damaged bytes can raise any error
        raise ValueError(f"{file} is damaged: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a mapping of tensors, got {type(data).__name__}")
    if oversized is not None:
        raise ValueError(f"{file} is damaged: it claims a tensor of {tuple(oversized.shape)} and holds less")
    return data


def _oversized(data: Any) -> Tensor | None:
    """The first (nested) tensor larger than its storage: strides of 0 can claim any size."""
    if isinstance(data, Tensor):
        dense = data.layout == torch.strided and data.device.type == "cpu"
        held = data.untyped_storage().nbytes() if dense else 0
        return data if data.numel() * data.itemsize > held else None
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    return next((tensor for part in parts if (tensor := _oversized(part)) is not None), None)


def check_size(build: Callable[[], nn.Module], state: Mapping[str, Tensor], label: str) -> None:
    """`load_strict`'s check on the meta device, before a model of a huge config is allocated.

    Raises:
        ValueError: names or shapes differ from those of the model.
    """
    with torch.device("meta"):
        own = build().state_dict()
    _check_fit(own, state, label)


def load_strict(model: nn.Module, state: Mapping[str, Tensor], label: str) -> None:
    """Load a state dict that must fit exactly.

    Args:
        model: gets the weights.
        state: its state dict.
        label: name of the weights in messages.

    Raises:
        ValueError: missing or unexpected keys, wrong shapes, integers or complex numbers for weights; the
            message lists some of them.
    """
    _check_fit(model.state_dict(), state, label)
    model.load_state_dict(dict(state))


def check_finite(state: Mapping[str, Tensor], label: str) -> None:
    """Raise ValueError if a tensor of a state dict holds NaN or infinity."""
    # One-byte floats have no isfinite.
    wide = {name: value if value.itemsize > 1 else value.float() for name, value in state.items()}
    if wrong := sorted(name for name, value in wide.items() if not value.isfinite().all()):
        raise ValueError(f"{label} hold NaN or infinity in {len(wrong)} tensors ({some(wrong)}); take others")


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], label: str) -> None:
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shared = sorted(own.keys() & state.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in shared
        if own[name].shape != state[name].shape
    ]
    # Quantised weights are integers; cast without their scale they would be other weights.
    types = [
        f"{name} {state[name].dtype} for {own[name].dtype}"
        for name in shared
        if own[name].is_floating_point() != state[name].is_floating_point()
    ]
    faults = [
        f"{len(names)} {fault} ({some(names)})"
        for fault, names in (
            ("keys missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another type", types),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{label} do not fit the config: {', '.join(faults)}")


def some(names: list[str]) -> str:
    """The first three names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def pickle_refusal(file: str | Path, error: Exception) -> str:
    """Message for a pickle that torch.load refuses with weights_only=True."""
    reason = str(error)
    if call := re.search(r"GLOBAL (\S+)", reason):
        return (
            f"{file} is refused: it is a pickle that would call {call[1]} when read, and so could run any "
            "code (nothing in it was run); get the weights as safetensors or, if you trust whoever made the "
            "file, read it elsewhere with torch.load(FILE, weights_only=False) and write its tensors with "
            "safetensors.torch.save_file"
        )
    detail = reason.rpartition("WeightsUnpickler error:")[2].strip()
    return (
        f"{file} is refused: it is damaged, or no pickle of tensors and plain values "
        f"({first_line(detail)}); get the weights as safetensors, or the file again"
    )


def first_line(error: object) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
