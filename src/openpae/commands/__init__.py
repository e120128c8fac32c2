"""The commands of `pae`, one function each. Their signatures are the options, their docstrings the help."""
