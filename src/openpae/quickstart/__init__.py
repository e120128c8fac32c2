"""`pae quickstart`: emoji, a tokenizer, a generator and a report from one command.

- `run` runs all stages. `plans` has their configs and divides the time budget. `workers` chooses processes
  and threads.
- `verdict` compares the result with baselines that need no training. `page` is the report.
"""
