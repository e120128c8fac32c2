"""The training loop. It knows no model and no data.

- `loop.fit` trains a `task.Task`, which yields losses: one `Update` for each player and device batch.
- A checkpoint is a folder: a model with the exported weights, the training state, the config of the run, and
  checkpoint.json. `checkpoints.save` writes it. The text of `checkpoints` lists the files.
- A resumed run equals an uninterrupted one for three reasons. `checkpoints` restores weights, optimizers,
  EMA, mean gradient norms, pace and the skipped data steps. Draws are functions of seed, step of the data
  order and name (`runtime.draws`). The data order is a function of the seed and the images seen
  (`data.order`).
- `health` finds losses and gradients that are not finite, and spikes, and decides which updates are skipped.
  A rollback (`loop`) skips a step of the data order.
- `run_folder` decides which config a run folder accepts, `state_file` what a training state may hold.
- `settings` has optimizer, schedule and loop; `optim` builds the optimizer and splits a step into device
  batches; `pace` trains by the clock; `ema` averages weights; `parallel` is DDP and FSDP2.
- `journal` writes the log, `trackers` shows it elsewhere. `diagnosis` finds where a step became not finite.
"""
