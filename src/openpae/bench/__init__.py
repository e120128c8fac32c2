"""How fast a training step is on this machine: `pae bench`.

- `generator` measures generators, in training and sampling, `tokenizer` a training step of the tokenizer.
- `noise` makes random data of real shapes for both.
- `record` writes results with machine and settings, and compares two records.
"""
