"""The training loop. It knows no model and no data.

- `loop.fit` trains a `task.Task`, which yields losses, one `Update` for each optimizer step.
- A resumed run equals an uninterrupted one for three reasons. `checkpoints` restores weights, optimizers,
  EMA, pace, and what `health` knows: gradient norms and data steps that are skipped. Draws are functions of
  seed, step and name (`runtime.draws`). The data order is a function of the seed and the images seen
  (`data.order`).
- `run_folder` decides which config a run folder accepts.
"""
