"""The three stages of the paper on the engine: refiner (a), tokenizer (b), generator (c).

- `refiner`, `tokenizer` and `generator` hold one task a stage, and the function that trains it.
- `settings` has one config a stage. It imports no torch.
- `targets` fits raw targets, without a refiner. `given` starts a run from the weights of a saved model.
- `online` encodes images at each step, in place of a latent cache.
"""
