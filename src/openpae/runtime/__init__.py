"""Where a run computes: processes, device and precision, seeded draws, versions.

- Processes: `processes` holds the process group and every collective. Three rooms may import
  torch.distributed: this one, `engine` (DDP, FSDP2, sharded checkpoints) and `plan` (a fake process group).
- Precision: `device.autocast` is the one place where bf16 autocast is switched on.
- Draws: every random number is a function of a seed, a name, and a step or the number of a sample (`draws`).
  No state of random numbers outlives a step or a sample.
"""
