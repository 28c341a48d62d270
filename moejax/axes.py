"""The names of mesh axes, spelt here and nowhere else."""

RANKS = "ranks"
"""Attention is data-parallel over it and experts are spread over it: one device each."""
