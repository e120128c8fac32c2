"""Grids of runs that reproduce the paper's tables and figures.

- `plan` turns studies into stages, `work` does a stage, `once` skips finished stages and locks running ones.
- `verdicts` decides a claim from the values of its rows: `compare` gives the interval and the verdict.
  `page` shows them.
"""
