"""Grids of runs that reproduce the paper's tables and figures.

- `settings` has the config of a study. `plan` turns studies into stages (`stage`). `run` runs them: `work`
  does a stage, `once` skips finished stages and locks running ones, `shared` keeps what stages have in
  common.
- `table` collects the results. `verdicts` decides a claim from the values of its rows: `compare` gives the
  interval and the verdict. `correlations` has the rank correlations. `page` shows them.
- `power` says which differences a study can show, `rehearse` how long it takes.
"""
