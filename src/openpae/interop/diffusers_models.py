"""Autoencoders of the diffusers package, on images in [0, 1]."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from openpae.runtime.extras import needs
from openpae.storage.files import fingerprint

_UNIT_RANGE = {"AutoencoderRAE"}
"""Classes with images in [0, 1]; all others use [-1, 1]."""
_OWN_SCALING = {"AutoencoderRAE"}
"""Classes whose encode and decode apply the scaling of their config."""


@runtime_checkable
class _Autoencoder(Protocol):
    """The common methods of diffusers' autoencoders; without return_dict they return tuples."""

    def encode(self, x: Tensor, return_dict: bool = True) -> Any: ...

    def decode(self, z: Tensor, return_dict: bool = True) -> Any: ...


class DiffusersModel:
    """An image autoencoder of diffusers: the mode of its posterior, loaded in float32.

    Args:
        source: OWNER/NAME, OWNER/NAME/SUBFOLDER or a folder.
        device: device of the weights.

    Raises:
        FileNotFoundError: no such folder or name.
        ValueError: no autoencoder, or weights that do not fit.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        model, config = load_diffusers(source)
        self.source, self.module = source, model.to(device).eval().requires_grad_(False)
        self.name = str(config["_class_name"])
        self._low, self._span = (0.0, 1.0) if self.name in _UNIT_RANGE else (-1.0, 2.0)
        facts = {
            key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"
        }
        self.fingerprint = fingerprint(model.state_dict(), repr(sorted(facts.items())))
        size = config.get("sample_size") or config.get("image_size") or 256
        self.side = size if isinstance(size, int) else int(size[0])
        """Side of its images in pixels; 256 if the config does not hold it."""

    @property
    def scaling(self) -> tuple[Tensor, Tensor]:
        """Shift and factor, (1,) or (C, 1, 1): its generators see (z - shift) * factor.

        From shift_factor and scaling_factor, or latents_mean and latents_std.
        """
        config = {} if self.name in _OWN_SCALING else dict(self.module.config)
        mean, std = (_column(config.get(name)) for name in ("latents_mean", "latents_std"))
        shift = torch.tensor([float(config.get("shift_factor") or 0.0)]) if mean is None else mean
        factor = torch.tensor([float(config.get("scaling_factor") or 1.0)])
        return shift, factor if std is None else factor / std

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1], not scaled.

        Raises:
            ValueError: it takes no images of this size.
        """
        try:
            x = (images * self._span + self._low).to(self.module.device, self.module.dtype)
            output = self.module.encode(x, return_dict=False)[0]
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{self.source} ({self.name}) takes no images {tuple(images.shape)}; only image autoencoders "
                f"can be used, at a size that they allow ({str(error).splitlines()[0]})"
            ) from None
        latent: Tensor = output if isinstance(output, Tensor) else output.mode()  # of a posterior
        return latent.float()

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents that are not scaled."""
        z = z.to(self.module.device, self.module.dtype)
        images: Tensor = self.module.decode(z, return_dict=False)[0]
        return ((images.float() - self._low) / self._span).clamp(0, 1)


def load_diffusers(name: str) -> tuple[Any, dict[str, Any]]:
    """The model and the config of its file. Missing or unexpected weights raise, unlike in diffusers.

    Args:
        name: OWNER/NAME, OWNER/NAME/SUBFOLDER or a folder.

    Raises:
        FileNotFoundError: no such folder or name.
        ValueError: no autoencoder, or weights that do not fit.
    """
    with needs("diffusers", name):
        import diffusers

    source, subfolder = name, None
    if not Path(name).is_dir():
        owner_and_name, rest = name.split("/")[:2], name.split("/")[2:]
        source, subfolder = "/".join(owner_and_name), "/".join(rest) or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers calls deprecated functions of the hub
            config = dict(diffusers.AutoModel.load_config(source, subfolder=subfolder))
        kind = getattr(diffusers, config.get("_class_name", ""), None)
        if kind is None or not issubclass(kind, _Autoencoder):
            raise ValueError(
                f"{name} is no autoencoder of diffusers, but {config.get('_class_name', 'unknown')}"
            )
        # low_cpu_mem_usage needs the package accelerate; the report below names mismatched sizes.
        model, report = kind.from_pretrained(
            source,
            subfolder=subfolder,
            torch_dtype=torch.float32,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,
        )
    except OSError as error:
        raise FileNotFoundError(
            f"no diffusers autoencoder at {name!r}; give a folder with config.json, or a hub name that can "
            f"be reached: OWNER/NAME or OWNER/NAME/SUBFOLDER ({str(error).strip().splitlines()[0]})"
        ) from None
    faults = [*report["missing_keys"], *map(str, report["mismatched_keys"]), *report["unexpected_keys"]]
    if faults:
        raise ValueError(f"weights at {name!r} do not fit {kind.__name__}: {', '.join(sorted(faults)[:5])}")
    return model, config


def _column(values: Any) -> Tensor | None:
    """Numbers per channel as (C, 1, 1); None where a config has none."""
    return None if values is None else torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
