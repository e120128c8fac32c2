"""Weights as files: read foreign ones without running what they hold, and load them strictly."""

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
    """Tensors of a foreign file: safetensors, or a pickle that holds nothing but data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or a pickle that would run code when read; nothing in it was run.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no weights file at {file}")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol that it may not know: then it raises too
            # Mapped, as a training checkpoint is mostly optimizer state, which nobody here will look at.
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        claimed = _claimed(data)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(pickle_refusal(file, error)) from None
    except Exception as error:  # the bytes of a damaged file can lead its reader to any of them
        raise ValueError(f"{file} is damaged: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a mapping of tensors, got {type(data).__name__}")
    if claimed is not None:
        raise ValueError(f"{file} is damaged: it claims a tensor of {tuple(claimed.shape)} and holds less")
    return data


def _claimed(data: Any) -> Tensor | None:
    """A tensor, however nested, that has more numbers than are stored: strides of 0 can claim any size."""
    if isinstance(data, Tensor):
        dense = data.layout == torch.strided and data.device.type == "cpu"
        held = data.untyped_storage().nbytes() if dense else 0
        return data if data.numel() * data.itemsize > held else None
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    return next((found for part in parts if (found := _claimed(part)) is not None), None)


def check_size(build: Callable[[], nn.Module], state: Mapping[str, Tensor], what: str) -> None:
    """See on the meta device, where nothing is allocated, that a model is no larger than its weights.

    Raises:
        ValueError: the config asks for other weights than these.
    """
    with torch.device("meta"):
        own = build().state_dict()
    _check_fit(own, state, what)


def load_strict(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        ValueError: missing or unexpected keys, or wrong shapes; the message lists some of them.
    """
    _check_fit(model.state_dict(), state, what)
    model.load_state_dict(dict(state))


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    faults = [
        f"{len(names)} {label} ({some(names)})"
        for label, names in (
            ("keys missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{what} do not fit the config: {', '.join(faults)}")


def some(names: list[str]) -> str:
    """The first three of a list of names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def pickle_refusal(file: str | Path, error: Exception) -> str:
    """Why torch.load with weights_only=True did not read a pickle, and what can be done about it."""
    reason = str(error)
    if found := re.search(r"GLOBAL (\S+)", reason):
        return (
            f"{file} is refused: it is a pickle that would call {found[1]} when read, and so could run any "
            "code (nothing in it was run); get the weights as safetensors or, if you trust whoever made the "
            "file, read it elsewhere with torch.load(FILE, weights_only=False) and write its tensors with "
            "safetensors.torch.save_file"
        )
    detail = reason.rpartition("WeightsUnpickler error:")[2].strip()
    return (
        f"{file} is refused: it is damaged, or no pickle of tensors and plain values "
        f"({first_line(detail)}); get the weights as safetensors, or the file anew"
    )


def first_line(error: object) -> str:
    """The first line of a message; the name of an error that has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
