"""Prior-Aligned AutoEncoders (arXiv:2605.07915): a diffusion model trains quickly on their latents.

Every public name is loaded at its first use, so that `import openpae` and `pae --help` do not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; `_HOMES` says the same at run time
    from openpae.interop.released import import_generator, import_tokenizer
    from openpae.models.configs import DecoderConfig, DiTDHConfig, LightningDiTConfig, PAEConfig
    from openpae.models.dit import LightningDiT
    from openpae.models.ditdh import DiTDH
    from openpae.models.encoders import Encoder, FrozenEncoder, load_encoder
    from openpae.models.saved import load_generator, load_prior, load_tokenizer
    from openpae.models.tokenizer import PAE, build_tokenizer
    from openpae.models.vfms import ENCODERS, EncoderSpec
    from openpae.sampling.pipeline import Pipeline
    from openpae.sampling.sampler import balanced_labels, sample_images, sample_latents
    from openpae.sampling.settings import SamplerConfig
    from openpae.storage.model_folder import identity_of
    from openpae.storage.pairs import list_models

__version__ = "0.1.0"

__all__ = [
    "ENCODERS",
    "PAE",
    "DecoderConfig",
    "DiTDH",
    "DiTDHConfig",
    "Encoder",
    "EncoderSpec",
    "FrozenEncoder",
    "LightningDiT",
    "LightningDiTConfig",
    "PAEConfig",
    "Pipeline",
    "SamplerConfig",
    "balanced_labels",
    "build_tokenizer",
    "identity_of",
    "import_generator",
    "import_tokenizer",
    "list_models",
    "load_encoder",
    "load_generator",
    "load_prior",
    "load_tokenizer",
    "sample_images",
    "sample_latents",
]

_HOMES = {
    "interop.released": ("import_generator", "import_tokenizer"),
    "models.configs": ("DecoderConfig", "DiTDHConfig", "LightningDiTConfig", "PAEConfig"),
    "models.dit": ("LightningDiT",),
    "models.ditdh": ("DiTDH",),
    "models.encoders": ("Encoder", "FrozenEncoder", "load_encoder"),
    "models.saved": ("load_generator", "load_prior", "load_tokenizer"),
    "models.tokenizer": ("PAE", "build_tokenizer"),
    "models.vfms": ("ENCODERS", "EncoderSpec"),
    "sampling.pipeline": ("Pipeline",),
    "sampling.sampler": ("balanced_labels", "sample_images", "sample_latents"),
    "sampling.settings": ("SamplerConfig",),
    "storage.model_folder": ("identity_of",),
    "storage.pairs": ("list_models",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"openpae.{module}"), name)
    raise AttributeError(f"module 'openpae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
