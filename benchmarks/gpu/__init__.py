"""What a GPU makes of the kernels and of a whole step, beside what it can do: see `python -m benchmarks.gpu --help`."""
