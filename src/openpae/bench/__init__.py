"""How fast a training step is on this machine, and how two records compare."""
