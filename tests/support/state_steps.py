"""Steps of one sequence through a layer with a state, cut as a test likes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config.layer_states import LayerStates, commit_states
from moejax.config.step_inputs import Bucket, StepInputs, idle_inputs, unpack
from planner.plan.step_layout import TILE

BUCKET = Bucket(decode=1, tiles=3, max_pages=1, states=True)
PLACES = 4
LAYER = jnp.int32(1)
"""Of three, whose states are held."""
RunLayer = Callable[[np.ndarray, LayerStates, StepInputs], tuple[Any, LayerStates]]
"""Outputs of the rows of BUCKET by layer LAYER, and the new states."""


def chunk_inputs(cached: int, count: int, read: int) -> StepInputs:
    """Inputs of a step that has `count` rows of one sequence after `cached`: one decode row, or a chunk of tiles."""
    first = 0 if count == 1 else BUCKET.decode
    row = np.arange(BUCKET.rows) - first
    inputs = unpack(jnp.asarray(idle_inputs(BUCKET)), BUCKET)
    return dataclasses.replace(
        inputs,
        positions=jnp.where((row >= 0) & (row < count), cached + row, -1),
        cached=jnp.full(BUCKET.segments, cached, jnp.int32),
        new_base=jnp.full(BUCKET.segments, first, jnp.int32),
        state_read=jnp.full(BUCKET.segments, read, jnp.int32),
    )


def in_chunks(run: RunLayer, rows: np.ndarray, shapes: LayerStates, sizes: list[int]) -> tuple[np.ndarray, LayerStates]:
    """The outputs of all rows, and the state after the last, of steps with so many rows. States that nobody wrote are
    not a number; `shapes` are those of PLACES states of three layers."""
    at, place, outputs = 0, 0, []
    states = jax.tree.map(lambda each: jnp.full(each.shape, np.nan, each.dtype), shapes)
    for size in sizes:
        first, last = (0, 0) if size == 1 else (BUCKET.decode, BUCKET.decode + (size - 1) // TILE)
        step = np.zeros((BUCKET.rows, rows.shape[1]), np.float32)
        step[first : first + size] = rows[at : at + size]
        out, new = run(step, states, chunk_inputs(at, size, place))
        assert not np.asarray(out)[[*range(first), *range(first + size, BUCKET.rows)]].any(), "padding stays zero"
        outputs.append(out[first : first + size])
        at, place = at + size, (place + 1) % 3
        of_layers = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), new)
        write = np.full(BUCKET.segments, PLACES, np.int32)
        write[last] = place
        states = commit_states(states, of_layers, write)
    return np.concatenate(outputs), jax.tree.map(lambda leaf: np.asarray(leaf[1, place]), states)
