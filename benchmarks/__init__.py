"""Figures that the README quotes, each by one program: `python -m benchmarks.NAME`."""
