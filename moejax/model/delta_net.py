"""A layer whose context is a state: the gated delta net (arXiv 2412.06464) of Qwen3-Next.

    row -> project -> [ queries, keys, values ] -> short convolution over time -> delta rule -> norm, gate -> project

Of each head the state is a matrix S `[d_key, d_value]`. A row with query q, key k, value v, decay a and rate b makes it

    S' = a S;   S'' = S' + k (b (v - k S'))^T;   output q S''

Rows of a sequence are computed one after the other in the order of their positions, whether they are the rows of a tile
or decode rows of many steps. So a row has the same sums in all of them (docs/decisions/0021); the chunked form with
dots over many rows would not.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.delta_inputs import CHAINED, EMPTY, PADDING, DeltaInputs
from moejax.config.layer_states import LayerStates
from moejax.config.model_config import ModelConfig
from moejax.config.state_params import DeltaNetWeights
from moejax.config.step_inputs import Bucket, StepInputs
from moejax.model.layers import ordered_sum, read_weight, rms_norm, row_dot
from moejax.model.short_convolution import convolve, first_rows, last_inputs, read_inputs
from moejax.ops import cpu
from planner.plan.step_layout import TILE

NORM_EPS = 1e-6
"""Added to the squared length of queries and keys, as the published code does."""


def delta_net(
    h_RD: Float[ArrayLike, "R D"],
    weights: DeltaNetWeights,
    states: LayerStates,
    layer: Int[ArrayLike, ""],
    inputs: StepInputs,
    bucket: Bucket,
    cfg: ModelConfig,
) -> tuple[Float[ArrayLike, "R D"], LayerStates]:
    """The outputs of a step's normed rows, zeros for padding, and the new state of each segment `[Z, ...]` after its
    last row. `layer` counts the layers of `states`."""
    delta = cfg.delta_net
    assert delta is not None
    R, real_R = len(h_RD), inputs.positions >= 0
    projected = row_dot(h_RD, weights.project)
    channels_RC, gate = projected[:, : delta.channels], projected[:, delta.channels :]
    write, speed = jnp.split(row_dot(h_RD, weights.rates), 2, axis=1)
    old_inputs = read_inputs(states.inputs, layer, inputs)
    mixed = jax.nn.silu(convolve(channels_RC, old_inputs, read_weight(weights.convolution), inputs, bucket))
    q, k, v = jnp.split(mixed, (delta.keys, 2 * delta.keys), axis=1)
    q = unit_heads(q.reshape(R, delta.key_heads, delta.d_key)) * delta.d_key**-0.5
    decay = jnp.exp(-jnp.exp(weights.decay) * jax.nn.softplus(speed + weights.rate_bias))
    outputs, matrix = delta_rule(
        DeltaInputs(
            q=q,
            k=unit_heads(k.reshape(R, delta.key_heads, delta.d_key)),
            v=v.reshape(R, delta.value_heads, delta.d_value),
            decay=decay[..., None],
            rate=jnp.where(real_R[:, None], jax.nn.sigmoid(write), PADDING),
            states=states.matrix,
            layer=layer,
            source=state_sources(inputs, bucket),
            decode=bucket.decode,
        )
    )
    normed = rms_norm(outputs, weights.norm, cfg.norm_eps).reshape(R, -1) * jax.nn.silu(gate)
    out_RD = row_dot(jnp.where(real_R[:, None], normed, 0.0), weights.out)
    new_inputs = last_inputs(channels_RC, old_inputs, inputs, bucket)
    return out_RD, LayerStates(matrix=matrix, inputs=new_inputs)


def delta_rule(inputs: DeltaInputs) -> tuple[Float[jax.Array, "R V Dv"], Float[jax.Array, "Z V Dk Dv"]]:
    """The outputs of all rows, and the states of all segments after their rows."""
    return cpu.delta_rule(inputs) if cpu.active() else delta_rule_reference(inputs)


def delta_rule_reference(inputs: DeltaInputs) -> tuple[Float[jax.Array, "R V Dv"], Float[jax.Array, "Z V Dk Dv"]]:
    """`delta_rule` by XLA: decode rows beside each other, the rows of tiles one after the other."""
    B, share = inputs.decode, inputs.v.shape[1] // inputs.k.shape[1]
    q, k = (jnp.repeat(each, share, axis=1) for each in (inputs.q, inputs.k))
    rows = (q, k, inputs.v, inputs.decay, inputs.rate)
    held_Z = inputs.states[inputs.layer, jnp.maximum(inputs.source, 0)]
    start_Z = jnp.where((inputs.source >= 0)[:, None, None, None], held_Z, 0.0)
    advance = functools.partial(_advance, corrects=inputs.corrects)
    states, outputs = advance(start_Z[:B], tuple(each[:B] for each in rows))
    if len(inputs.source) == B:
        return outputs, states

    def tile(state: jax.Array, each: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start, chained, *of_rows = each
        state = jnp.where(chained, state, start)
        state, out = lax.scan(advance, state[None], tuple(row[:, None] for row in of_rows))
        return state[0], (state[0], out[:, 0])

    tiles = [each[B:].reshape(-1, TILE, *each.shape[1:]) for each in rows]
    begin = (start_Z[B:], inputs.source[B:] == CHAINED, *tiles)
    _, (tile_states, tile_outputs) = lax.scan(tile, jnp.zeros_like(start_Z[0]), begin)
    tile_outputs = tile_outputs.reshape(-1, *tile_outputs.shape[2:])
    return jnp.concatenate([outputs, tile_outputs]), jnp.concatenate([states, tile_states])


def _advance(
    state: Float[ArrayLike, "B V Dk Dv"], row: tuple[ArrayLike, ...], *, corrects: bool
) -> tuple[Float[ArrayLike, "B V Dk Dv"], Float[ArrayLike, "B V Dv"]]:
    """The states after one more row each, and the rows' outputs."""
    q, k, v, decay, rate = row
    decayed = state * decay[..., None]
    read = ordered_sum((decayed * k[..., None]).swapaxes(-1, -2)) if corrects else 0.0
    change = (v - read) * rate[..., None]
    written = k[..., None] * change[..., None, :]
    if not corrects:  # else XLA may round one of the products or the other, by the number of rows
        decayed, written = lax.optimization_barrier((decayed, written))
    added = decayed + written
    real = rate >= 0
    output = jnp.where(real[..., None], ordered_sum((added * q[..., None]).swapaxes(-1, -2)), 0.0)
    return jnp.where(real[..., None, None], added, state), output


def unit_heads(x_RNH: Float[ArrayLike, "R N H"]) -> Float[ArrayLike, "R N H"]:
    """Each head divided by its length."""
    return x_RNH * lax.rsqrt(ordered_sum(x_RNH * x_RNH) + NORM_EPS)[..., None]


def state_sources(inputs: StepInputs, bucket: Bucket) -> Int[ArrayLike, " Z"]:
    """Where the state of each segment begins: a place in `states`, EMPTY for a sequence that begins, CHAINED after
    the tile before of the same chunk."""
    assert inputs.state_read is not None
    source_Z = jnp.where(inputs.cached > 0, inputs.state_read, EMPTY)
    return jnp.where(inputs.new_base == first_rows(bucket), source_Z, CHAINED)
