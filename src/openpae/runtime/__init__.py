"""Where a run computes: processes, device and precision, seeded draws, versions.

- Processes: `processes` holds the process group and its collectives. Three rooms may import
  torch.distributed: this one, `engine` (DDP, FSDP2, sharded checkpoints) and `plan` (a fake process group).
- Precision: `device.autocast` is bf16 autocast, for every setting `precision: bf16`. A model whose own
  weights are in half precision opens autocast in `models.precision`.
- Draws: the noise of training is a function of a seed, a step of the data order and a name, the noise of a
  sample one of a seed and its number (`draws`). Data order and augmentation are functions of a seed and the
  images seen (`data.order`). Initial weights come from torch's global generator, seeded with `loop.seed`.
  Metrics seed generators of their own. No state of random numbers is saved.
- `terminal` prints, `signals` ends a run, `extras` names a missing package, `provenance` holds versions,
  `children` the processes that a command starts, `cards` what openpae knows of GPUs. `escape` makes names
  safe to print, `names` finds the near miss of a mistyped one.
"""
