"""Grids of runs that reproduce the paper's tables and figures.

- `plan` turns studies into jobs, `work` does a job, `once` does none twice.
- `verdicts` decides a claim from the values of its rows: `compare` gives the interval and the verdict.
  `page` shows them.
"""
