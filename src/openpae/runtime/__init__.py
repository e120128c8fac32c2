"""Where the code runs: the processes that this one starts."""
