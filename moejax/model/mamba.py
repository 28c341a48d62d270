"""A layer whose context is a state: Mamba-2 (arXiv 2405.21060), as Nemotron-H has it (arXiv 2504.03624).

    row -> project -> [ values x, B, C ] -> short convolution over time -> state -> gate, norm by group -> project

Of each head the state is a matrix S `[d_state, d_head]`. With a step size d, which is positive, and the head's rate A a
row makes it

    S' = exp(-A d) S + B (d x)^T;   output C S' + D x

which is the delta rule without its correction: rows are added one after the other by the same code
(`moejax.model.delta_net`, docs/decisions/0021).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.delta_inputs import PADDING, DeltaInputs
from moejax.config.layer_states import LayerStates
from moejax.config.model_config import ModelConfig
from moejax.config.state_params import MambaWeights
from moejax.config.step_inputs import Bucket, StepInputs
from moejax.model.delta_net import delta_rule, state_sources
from moejax.model.layers import read_weight, rms_norm, row_dot
from moejax.model.short_convolution import convolve, last_inputs, read_inputs


def mamba(
    h_RD: Float[ArrayLike, "R D"],
    weights: MambaWeights,
    states: LayerStates,
    layer: Int[ArrayLike, ""],
    inputs: StepInputs,
    bucket: Bucket,
    cfg: ModelConfig,
) -> tuple[Float[ArrayLike, "R D"], LayerStates]:
    """The outputs of a step's normed rows, zeros for padding, and the new state of each segment `[Z, ...]` after its
    last row. `layer` counts the layers of `states`."""
    sizes = cfg.mamba
    assert sizes is not None
    R, real_R1 = len(h_RD), inputs.positions[:, None] >= 0
    projected = row_dot(h_RD, weights.project)
    gate, channels_RC = projected[:, : sizes.values], projected[:, sizes.values :]
    step_RN = jax.nn.softplus(row_dot(h_RD, weights.rates) + weights.rate_bias)
    old_inputs = read_inputs(states.inputs, layer, inputs)
    mixed = convolve(channels_RC, old_inputs, read_weight(weights.kernel), inputs, bucket)
    mixed = jax.nn.silu(mixed if weights.kernel_bias is None else mixed + weights.kernel_bias)
    x, write, read = jnp.split(mixed, (sizes.values, sizes.values + sizes.keys), axis=1)
    x = x.reshape(R, sizes.heads, sizes.d_head)
    outputs, matrix = delta_rule(
        DeltaInputs(
            q=read.reshape(R, sizes.groups, sizes.d_state),
            k=write.reshape(R, sizes.groups, sizes.d_state),
            v=x * step_RN[..., None],
            decay=jnp.exp(-jnp.exp(weights.decay) * step_RN)[..., None],
            rate=jnp.where(real_R1, jnp.ones_like(step_RN), PADDING),
            states=states.matrix,
            layer=layer,
            source=state_sources(inputs, bucket),
            decode=bucket.decode,
            corrects=False,
        )
    )
    gated = (outputs + x * weights.skip[:, None]).reshape(R, -1) * jax.nn.silu(gate)
    grouped = gated.reshape(R, sizes.groups, -1)
    normed = rms_norm(grouped, jnp.ones(grouped.shape[-1]), cfg.norm_eps).reshape(R, -1) * weights.norm
    out_RD = row_dot(jnp.where(real_R1, normed, 0.0), weights.out)
    new_inputs = last_inputs(channels_RC, old_inputs, inputs, bucket)
    return out_RD, LayerStates(matrix=matrix, inputs=new_inputs)
