"""The names of mesh axes, spelt here and nowhere else."""

import jax
import numpy as np

RANKS = "ranks"
"""Attention is data-parallel over it and experts are spread over it: one device each."""

Numbers = jax.Array | np.ndarray
"""What shapes are annotated of."""
