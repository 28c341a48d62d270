"""Layers whose context is a state, of any kind: delta nets, short convolutions, Mamba-2 and Kimi delta attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.layer_states import LayerStates
from moejax.config.model_config import ModelConfig
from moejax.config.params import Layer
from moejax.config.step_inputs import Bucket, StepInputs
from moejax.model.delta_net import delta_net
from moejax.model.kimi_delta import kimi_delta
from moejax.model.mamba import mamba
from moejax.model.short_convolution import segment_of_rows, short_convolution


def mix_states(
    h_RD: Float[ArrayLike, "R D"],
    weights: Layer,
    states: LayerStates,
    layer: Int[ArrayLike, ""],
    inputs: StepInputs,
    bucket: Bucket,
    cfg: ModelConfig,
) -> tuple[Float[ArrayLike, "R D"], LayerStates]:
    """The outputs of a step's normed rows, zeros for padding, and the new state of each segment `[Z, ...]` after its
    last row. `layer` counts the layers of `states`."""
    if weights.convolution is not None:
        return short_convolution(h_RD, weights.convolution, states, layer, inputs, bucket)
    if weights.mamba is not None:
        return mamba(h_RD, weights.mamba, states, layer, inputs, bucket, cfg)
    if weights.kimi_delta is not None:
        return kimi_delta(h_RD, weights.kimi_delta, states, layer, inputs, bucket, cfg)
    assert weights.delta is not None
    return delta_net(h_RD, weights.delta, states, layer, inputs, bucket, cfg)


def finite_states(new: LayerStates, bucket: Bucket) -> Bool[ArrayLike, " R"]:
    """True for rows of segments whose new states in the last layer that has one are all finite."""
    finite = (jnp.isfinite(leaf[-1]).all(tuple(range(1, leaf.ndim - 1))) for leaf in jax.tree.leaves(new))
    return jnp.stack([*finite]).all(0)[segment_of_rows(bucket)]
