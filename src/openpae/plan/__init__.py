"""What a run needs, computed with tensors that have shapes and no values: `pae plan`."""
