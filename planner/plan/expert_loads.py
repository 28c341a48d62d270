"""The traffic of each expert: measured, made up by a Zipf law, or even."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import numpy as np

from planner.errors import InputError
from planner.inputs.file_kinds import FileKind, described
from planner.inputs.workload import Workload

LOADS = FileKind(
    no="no loads of experts", way_out="Give JSON: a list of rows [moe_layers][experts], alone or as loads in an object."
)


def load_shares(loads: np.ndarray | None, workload: Workload) -> np.ndarray:
    """Each expert's share of its layer's traffic, float [moe_layers, experts]; even shares when `loads` is None.

    `loads` may have any scale; a layer without traffic gets even shares. InputError when the shape is another or a load
    is negative or not finite.
    """
    shape, even = (workload.moe_layers, workload.experts), 1 / max(1, workload.experts)
    if loads is None:
        return np.full(shape, even)
    loads = checked_loads(loads, workload)
    total = loads.sum(axis=1, keepdims=True)
    return np.where(total > 0, loads / np.where(total > 0, total, 1), even)


def checked_loads(loads: object, workload: Workload, *, where: str = "") -> np.ndarray:
    """Loads as float [moe_layers, experts]. InputError, after `where` they come from, when they are anything else."""
    shape = (workload.moe_layers, workload.experts)
    try:
        array = np.array(loads, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != shape:
        raise InputError(f"{where}loads have shape {array.shape}; the model has [moe_layers, experts] = {shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError(f"{where}loads must be finite and at least 0, got {array.min()} to {array.max()}")
    return array


def read_loads(path: str | Path, workload: Workload) -> tuple[tuple[float, ...], ...]:
    """Measured loads from JSON: a list of rows, one per MoE layer, alone or under the key "loads"."""
    data = LOADS.read(path, LOADS.parse)
    rows = data.get("loads") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise InputError(f"{path}: {LOADS.error(f'it is {described(data)}')}")
    return tuple(tuple(map(float, row)) for row in checked_loads(rows, workload, where=f"{path}: "))


def zipf_loads(workload: Workload, exponent: float, seed: int = 0) -> np.ndarray:
    """Loads that fall as 1/rank**exponent, in another order on each layer: float [moe_layers, experts]."""
    if not isfinite(exponent) or exponent < 0:
        raise InputError(f"--skew is {exponent}; a Zipf exponent is a number of at least 0 (0 is even)")
    row = np.arange(1, workload.experts + 1) ** -float(exponent)
    rows = np.tile(row / row.sum(), (workload.moe_layers, 1))
    return np.random.default_rng(seed).permuted(rows, axis=1)
