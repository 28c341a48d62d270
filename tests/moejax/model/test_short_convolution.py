"""Laws of short convolutions: no bit depends on how rows are cut into steps, and the state is the last inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.layer_states import LayerStates, commit_states
from moejax.config.params import ConvolutionWeights
from moejax.config.step_inputs import Bucket, StepInputs, idle_inputs, unpack
from moejax.model.short_convolution import short_convolution
from planner.plan.step_layout import TILE

D, ROWS, PLACES = 12, 70, 4
BUCKET = Bucket(decode=1, tiles=3, max_pages=1, states=True)
RUN = jax.jit(lambda rows, weights, states, inputs: short_convolution(rows, weights, states, LAYER, inputs, BUCKET))
LAYER = jnp.int32(1)


def weights_of(kernel: int, biased: bool) -> ConvolutionWeights:
    draw = np.random.default_rng(kernel)
    normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)  # noqa: E731
    biases = (normal(3 * D), normal(D), normal(D)) if biased else (None, None, None)
    return ConvolutionWeights(normal(3 * D, D), normal(D, kernel), normal(D, D), *biases)


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


def in_chunks(rows: np.ndarray, weights: ConvolutionWeights, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of all rows, and the state after the last, of steps with so many rows."""
    kernel, at, place, outputs = weights.kernel.shape[1], 0, 0, []
    states = LayerStates(matrix=None, inputs=jnp.full((3, PLACES, kernel - 1, D), np.nan, jnp.float32))
    for size in sizes:
        first, last = (0, 0) if size == 1 else (BUCKET.decode, BUCKET.decode + (size - 1) // TILE)
        step = np.zeros((BUCKET.rows, D), np.float32)
        step[first : first + size] = rows[at : at + size]
        out, new = RUN(step, weights, states, chunk_inputs(at, size, place))
        assert not np.asarray(out)[[*range(first), *range(first + size, BUCKET.rows)]].any(), "padding stays zero"
        outputs.append(out[first : first + size])
        at, place = at + size, (place + 1) % 3
        of_layers = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), new)
        write = np.full(BUCKET.segments, PLACES, np.int32)
        write[last] = place
        states = commit_states(states, of_layers, write)
    return np.concatenate(outputs), np.asarray(states.inputs[1, place])


def by_numpy(rows: np.ndarray, weights: ConvolutionWeights) -> tuple[np.ndarray, np.ndarray]:
    """The outputs, and the last inputs of the convolution."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    zero, kernel = np.zeros(1), w.kernel.shape[1]
    gate_in, gate_out, values = np.split(
        rows @ w.project.T + (zero if w.project_bias is None else w.project_bias), 3, 1
    )
    padded = np.concatenate([np.zeros((kernel - 1, D)), gate_in * values])
    mixed = np.stack([(padded[t : t + kernel] * w.kernel.T).sum(0) for t in range(len(rows))])
    mixed = mixed + (zero if w.kernel_bias is None else w.kernel_bias)
    return (gate_out * mixed) @ w.out.T + (zero if w.out_bias is None else w.out_bias), padded[
        len(padded) - kernel + 1 :
    ]


@pytest.mark.parametrize(("kernel", "biased"), [(2, False), (4, True)])
def test_rows_have_the_same_bits_however_they_are_cut_into_steps(kernel: int, biased: bool) -> None:
    rows, weights = np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float32), weights_of(kernel, biased)
    outputs, state = in_chunks(rows, weights, [ROWS])
    for ours, theirs in zip((outputs, state), by_numpy(rows, weights), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    for sizes in ([1] * ROWS, [2, 1, 32, 33, 1, 1], [40, 2, 2, 26]):
        again, state_again = in_chunks(rows, weights, sizes)
        np.testing.assert_array_equal(again, outputs)
        np.testing.assert_array_equal(state_again, state)
