"""A layer whose context is a state: Kimi delta attention (arXiv 2510.26692) of Kimi-Linear and Ling 3.

    row -> project -> [ queries, keys, values ] -> short convolution over time -> delta rule -> norm, gate -> project

It is a gated delta net (`moejax.model.delta_net`) in which each key of a head's state decays by a factor of its own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.delta_inputs import PADDING, DeltaInputs
from moejax.config.layer_states import LayerStates
from moejax.config.model_config import ModelConfig
from moejax.config.state_params import KimiDeltaWeights
from moejax.config.step_inputs import Bucket, StepInputs
from moejax.model.delta_net import delta_rule, state_sources, unit_heads
from moejax.model.layers import Weight, read_weight, rms_norm, row_dot
from moejax.model.short_convolution import convolve, last_inputs, read_inputs


def kimi_delta(
    h_RD: Float[ArrayLike, "R D"],
    weights: KimiDeltaWeights,
    states: LayerStates,
    layer: Int[ArrayLike, ""],
    inputs: StepInputs,
    bucket: Bucket,
    cfg: ModelConfig,
) -> tuple[Float[ArrayLike, "R D"], LayerStates]:
    """The outputs of a step's normed rows, zeros for padding, and the new state of each segment `[Z, ...]` after its
    last row. `layer` counts the layers of `states`."""
    sizes = cfg.kimi_delta
    assert sizes is not None
    by_head, real_R1 = (len(h_RD), sizes.heads, sizes.d_head), inputs.positions[:, None] >= 0
    channels_RC = row_dot(h_RD, weights.project)
    old_inputs = read_inputs(states.inputs, layer, inputs)
    mixed = jax.nn.silu(convolve(channels_RC, old_inputs, read_weight(weights.kernel), inputs, bucket))
    q, k, v = (each.reshape(by_head) for each in jnp.split(mixed, 3, axis=1))
    speed = (_through(h_RD, weights.forget_in, weights.forget) + weights.rate_bias).reshape(by_head)
    outputs, matrix = delta_rule(
        DeltaInputs(
            q=unit_heads(q) * sizes.d_head**-0.5,
            k=unit_heads(k),
            v=v,
            decay=_decay(speed, weights.decay, sizes.least_log),
            rate=jnp.where(real_R1, jax.nn.sigmoid(row_dot(h_RD, weights.rates)), PADDING),
            states=states.matrix,
            layer=layer,
            source=state_sources(inputs, bucket),
            decode=bucket.decode,
        )
    )
    gate = jax.nn.sigmoid(_through(h_RD, weights.gate_in, weights.gate))
    normed = rms_norm(outputs, weights.norm, cfg.norm_eps).reshape(len(h_RD), -1) * gate
    out_RD = row_dot(jnp.where(real_R1, normed, 0.0), weights.out)
    new_inputs = last_inputs(channels_RC, old_inputs, inputs, bucket)
    return out_RD, LayerStates(matrix=matrix, inputs=new_inputs)


def _through(h_RD: Float[ArrayLike, "R D"], low: Weight | None, high: Weight) -> Float[ArrayLike, "R C"]:
    """A projection, through few numbers if it is made so."""
    return row_dot(h_RD if low is None else row_dot(h_RD, low), high)


def _decay(
    speed_RNH: Float[ArrayLike, "R N H"], scale_N: Float[ArrayLike, " N"], least_log: float | None
) -> Float[ArrayLike, "R N H"]:
    """The factor of each key of the state."""
    scale_N1 = jnp.exp(scale_N)[:, None]
    if least_log is None:
        return jnp.exp(-scale_N1 * jax.nn.softplus(speed_RNH))
    return jnp.exp(least_log * jax.nn.sigmoid(scale_N1 * speed_RNH))
