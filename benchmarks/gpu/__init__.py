"""Measures the kernels and whole steps on a GPU against the limits of the device: `python -m benchmarks.gpu --help`."""
