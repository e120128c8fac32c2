"""Prior-Aligned AutoEncoders (arXiv:2605.07915): tokenizers whose latents a diffusion model learns fast."""

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
    "load_encoder",
    "load_generator",
    "load_prior",
    "load_tokenizer",
    "sample_images",
    "sample_latents",
]
