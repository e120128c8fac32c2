"""Prior-Aligned AutoEncoders (arXiv:2605.07915): tokenizers whose latents a diffusion model learns fast."""

from openpae.checkpoint import load_generator, load_prior, load_tokenizer
from openpae.dit import LightningDiT, LightningDiTConfig
from openpae.ditdh import DiTDH, DiTDHConfig
from openpae.encoders import Encoder, FrozenEncoder, load_encoder
from openpae.folders import identity_of
from openpae.official import import_generator, import_tokenizer
from openpae.pipeline import Pipeline
from openpae.sampling import SamplerConfig, balanced_labels, sample_images, sample_latents
from openpae.tokenizer import PAE, DecoderConfig, PAEConfig, build_tokenizer
from openpae.vfms import ENCODERS, EncoderSpec

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
