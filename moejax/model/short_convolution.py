"""Convolutions over time, and the layer that is one: the gated short convolution of LFM2 (arXiv 2511.23404).

    row -> project -> [ gate of inputs, gate of outputs, values ] -> inputs = gate * values -> convolution over time
        -> gate * outputs -> project

Each channel is by itself: its output is a weighted sum of its last `kernel` inputs. The context of a request is the
last `kernel - 1` of them. They are added in one order, wherever they come from: rows of the same step, or the state. So
a row has the same sums in a tile and alone (docs/decisions/0021).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.layer_states import LayerStates
from moejax.config.state_params import ConvolutionWeights
from moejax.config.step_inputs import Bucket, StepInputs
from moejax.model.layers import read_weight, row_dot
from planner.plan.step_layout import TILE


def short_convolution(
    h_RD: Float[ArrayLike, "R D"],
    weights: ConvolutionWeights,
    states: LayerStates,
    layer: Int[ArrayLike, ""],
    inputs: StepInputs,
    bucket: Bucket,
) -> tuple[Float[ArrayLike, "R D"], LayerStates]:
    """The outputs of a step's normed rows, zeros for padding, and the new state of each segment `[Z, ...]` after its
    last row. `layer` counts the layers of `states`."""
    real_R1 = inputs.positions[:, None] >= 0
    projected = _plus(row_dot(h_RD, weights.project), weights.project_bias)
    in_gate, out_gate, values = jnp.split(projected, 3, axis=1)
    gated_RD = in_gate * values
    old_inputs = read_inputs(states.inputs, layer, inputs)
    mixed = _plus(convolve(gated_RD, old_inputs, read_weight(weights.kernel), inputs, bucket), weights.kernel_bias)
    out_RD = _plus(row_dot(jnp.where(real_R1, out_gate * mixed, 0.0), weights.out), weights.out_bias)
    new_inputs = last_inputs(gated_RD, old_inputs, inputs, bucket)
    return jnp.where(real_R1, out_RD, 0.0), LayerStates(matrix=None, inputs=new_inputs)


def _plus(x_RC: Float[ArrayLike, "R C"], bias: Float[ArrayLike, " C"] | None) -> Float[ArrayLike, "R C"]:
    return x_RC if bias is None else x_RC + bias


def segment_of_rows(bucket: Bucket) -> Int[np.ndarray, " R"]:
    """The segment of each row."""
    return np.concatenate([np.arange(bucket.decode), np.repeat(np.arange(bucket.decode, bucket.segments), TILE)])


def first_rows(bucket: Bucket) -> Int[np.ndarray, " Z"]:
    """The first row of each segment."""
    return np.concatenate([np.arange(bucket.decode), bucket.decode + TILE * np.arange(bucket.tiles)])


def read_inputs(
    held: Float[ArrayLike, "L states W C"], layer: Int[ArrayLike, ""], inputs: StepInputs
) -> Float[ArrayLike, "Z W C"]:
    """The inputs of the convolution before the chunk of each segment; zeros before a sequence begins."""
    assert inputs.state_read is not None
    found_ZWC = held[layer, inputs.state_read]
    return jnp.where((inputs.cached > 0)[:, None, None], found_ZWC, 0.0)


def convolve(
    x_RC: Float[ArrayLike, "R C"],
    old_ZWC: Float[ArrayLike, "Z W C"],
    weight_CK: Float[ArrayLike, "C K"],
    inputs: StepInputs,
    bucket: Bucket,
) -> Float[ArrayLike, "R C"]:
    """Each channel by itself over the last `kernel` rows of the sequence, the oldest first."""
    kernel, segment_R = weight_CK.shape[1], segment_of_rows(bucket)
    row_R = np.arange(len(segment_R))
    before_R = row_R - inputs.new_base[segment_R]  # rows of the same chunk before this one
    total_RC = jnp.zeros_like(x_RC)
    for back in reversed(range(kernel)):
        earlier = jnp.clip(kernel - 1 + before_R - back, 0, kernel - 2)
        is_new_R1 = (before_R >= back)[:, None]
        value_RC = jnp.where(is_new_R1, x_RC[np.maximum(row_R - back, 0)], old_ZWC[segment_R, earlier])
        total_RC = total_RC + value_RC * weight_CK[:, kernel - 1 - back]
    return total_RC


def last_inputs(
    x_RC: Float[ArrayLike, "R C"], old_ZWC: Float[ArrayLike, "Z W C"], inputs: StepInputs, bucket: Bucket
) -> Float[ArrayLike, "Z W C"]:
    """The last inputs of the convolution after each segment."""
    width, first_Z = old_ZWC.shape[1], first_rows(bucket)
    real_Z = jnp.zeros(bucket.segments, jnp.int32).at[segment_of_rows(bucket)].add(inputs.positions >= 0)
    end_Z1 = (first_Z - inputs.new_base + real_Z)[:, None]  # rows of the chunk up to the end of the segment
    at_ZW = end_Z1 - width + np.arange(width)
    new_ZWC = x_RC[jnp.clip(inputs.new_base[:, None] + at_ZW, 0, len(x_RC) - 1)]
    kept_ZWC = jnp.take_along_axis(old_ZWC, jnp.clip(width + at_ZW, 0, width - 1)[..., None], axis=1)
    return jnp.where((at_ZW >= 0)[..., None], new_ZWC, kept_ZWC)
