"""The three stages of the paper on the engine: refiner (a), tokenizer (b), generator (c).

`settings` has one config a stage. It imports no torch.
"""
