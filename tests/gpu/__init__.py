"""The checks of tests/gpu_check.py."""
