"""Models and data of others.

- `released` imports weights that authors released, `foreign_latents` latent caches of other programs.
- `kinds` says how a tokenizer is named (KIND:SOURCE). `spaces` opens one of any kind as two functions on
  images, `any_tokenizer` beside a generator.
- `diffusers_models` opens autoencoders of diffusers. `diffusers_adapter` and `diffusers_pipeline` make our
  models those of diffusers.
- `export` writes torch.export archives and ONNX files.
"""
