"""What a run needs: `pae plan`. It computes with fake tensors, which have shapes and no values.

- `estimate` gives memory, time and disk space from one step. `settings` has its assumptions, `text` shows it.
- `trial` runs two steps under fake tensors, `memory` counts bytes and operations in them.
- `fakes` builds the task without data and downloads, and a fake process group for several ranks.
"""
