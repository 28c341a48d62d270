"""Which experts a token goes to, and how much each of them counts."""

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.layers import row_dot


def route(
    x_TD: jax.Array, router_ED: jax.Array, bias_E: jax.Array, alive_E: jax.Array, moe: MoEConfig
) -> tuple[jax.Array, jax.Array]:
    """The chosen experts `[T, X]` in router order and their gates `[T, X]`.

    `alive_E` is False for masked experts: the next best takes over. Ties go to the lower expert, so that the
    choice is the same wherever it is made.
    """
    scores_TE = row_dot(x_TD, router_ED).astype(jnp.float32) + bias_E
    scores_TE = jnp.where(alive_E, scores_TE, -jnp.inf)
    best_TX, chosen_TX = jax.lax.top_k(scores_TE, moe.experts_per_token)
    if moe.gate == "softmax":
        return chosen_TX, jax.nn.softmax(best_TX, axis=-1)
    return chosen_TX, jnp.where(jnp.isfinite(best_TX), 1.0, 0.0)
