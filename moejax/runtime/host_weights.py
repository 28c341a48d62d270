"""Weights of a rank as host arrays in its weight format, which a CPU device aliases instead of copying."""

import math
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.checksums import aligned_array
from moejax.config.model_config import ModelConfig
from moejax.config.params import FeedForward, ParamSpec, Position, expert_positions, is_spec
from moejax.config.weight_formats import Quantized, slot_shapes, to_weight_format


def to_host_weights(cfg: ModelConfig, specs: Any, values: Any) -> Any:
    """Convert a tree of parameters, in float32 or as they are published, to the rank's weight format; None stays."""

    def leaf(spec: ParamSpec, value: np.ndarray | Quantized | None) -> Any:
        return None if value is None else jax.tree.map(_aligned, to_weight_format(cfg, spec, value))

    return jax.tree.map(leaf, specs, values, is_leaf=is_spec)


def empty_slots(cfg: ModelConfig, slots: int) -> dict[Position, FeedForward]:
    """Slots of zeros for the experts at every position."""
    shapes = {position: slot_shapes(cfg, position, slots) for position in expert_positions(cfg)}
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def expert_from_bytes(cfg: ModelConfig, position: Position, raw: np.ndarray) -> FeedForward | None:
    """One expert from its bytes (uint8, its leaves one after the other); None if there are more or fewer bytes."""
    shapes, tree = jax.tree.flatten(slot_shapes(cfg, position, 1))
    ends = np.cumsum([math.prod(leaf.shape[2:]) * leaf.dtype.itemsize for leaf in shapes])
    if raw.size != ends[-1]:
        return None
    parts = map(_aligned, np.split(raw, ends[:-1]))
    leaves = [part.view(leaf.dtype).reshape(leaf.shape[2:]) for part, leaf in zip(parts, shapes, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def _aligned(value: np.ndarray) -> np.ndarray:
    return aligned_array(np.ascontiguousarray(value), value.dtype)
