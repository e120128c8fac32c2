"""Models and data of others: released weights, foreign latents, tokenizers of any kind, diffusers, export."""
