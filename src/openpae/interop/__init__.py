"""Models and data of others: released weights, foreign latents, diffusers, torch.export and ONNX."""
