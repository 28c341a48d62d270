"""The states of requests on one rank, for layers whose context is a state instead of keys and values of positions.

A request has STATE_COPIES states. A step reads one, and its commit writes the next, so that the state before a step is
there until two more steps were committed: a step that fails is made again from the state that it read, also where the
step after it was committed already (docs/decisions/0021).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Int

from moejax.config.axes import ArrayLike
from moejax.config.model_config import ModelConfig


@struct.dataclass
class LayerStates:
    """States of all layers that have them, float32. Those of a rank are `[L, states, ...]`, a step's new ones
    `[L, Z, ...]`: after the last row of each segment. Leaves are arrays, shapes or partition specs."""

    matrix: Any
    """The state of each head, `[L, states, heads, keys, values]` (`StateMixer.matrix`); None for short convolutions."""
    inputs: Any
    """The last inputs of the convolution, the oldest first, `[L, states, kernel - 1, channels]`."""


def state_shapes(cfg: ModelConfig, states: int) -> LayerStates | None:
    """Shapes and dtypes of `states` states; None for a model without layers that have them."""
    mixer, lead = cfg.state_mixer, (len(cfg.state_layers), states)
    if mixer is None:
        return None
    inputs = jax.ShapeDtypeStruct((*lead, mixer.kernel - 1, mixer.inputs(cfg.d_model)), jnp.float32)
    matrix = mixer.matrix and jax.ShapeDtypeStruct((*lead, *mixer.matrix), jnp.float32)
    return LayerStates(matrix=matrix, inputs=inputs)


def state_bytes(cfg: ModelConfig) -> int:
    """Bytes of one state over all layers; 0 for a model without."""
    return 4 * cfg.state_elements


def commit_states(states: LayerStates, new: LayerStates, write_Z: Int[ArrayLike, " Z"]) -> LayerStates:
    """Write a step's new states to the places `write_Z`; those of place DROPPED are dropped."""
    return jax.tree.map(lambda old, rows: old.at[:, write_Z].set(rows, mode="drop"), states, new)
