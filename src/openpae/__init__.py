"""Prior-Aligned AutoEncoders (arXiv:2605.07915): train, measure and generate with diffusion-friendly
latents."""

__version__ = "0.1.0"
