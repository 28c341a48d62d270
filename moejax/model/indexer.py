"""The indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): which positions a query attends to.

The score of a position is `sum over heads of weight * relu(query . key)`. A query attends to the `chosen` positions of
the highest scores, of equal ones to the earlier, and to all while there are no more. The published code computes
scores in float8 after a Hadamard transform, which leaves exact products as they are; here they are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from moejax.config.attention_config import IndexerConfig
from moejax.config.axes import ArrayLike
from moejax.config.model_config import ModelConfig
from moejax.config.params import IndexerWeights
from moejax.model.layers import layer_norm, ordered_sum, row_dot
from moejax.model.rope import rotate


class IndexRows(NamedTuple):
    """The queries of rows, how much each head counts, and the key that the cache keeps."""

    q: Float[ArrayLike, "T I H"]
    weights: Float[ArrayLike, "T I"]
    key: Float[ArrayLike, "T H"]


def index_rows(
    h_TD: Float[ArrayLike, "T D"],
    query_TC: Float[ArrayLike, "T C"],
    weights: IndexerWeights,
    positions_T: Int[ArrayLike, " T"],
    cfg: ModelConfig,
    indexer: IndexerConfig,
) -> IndexRows:
    """Queries and keys of an indexer for normed rows `h` and the latents of their queries. The first numbers of both
    are rotated."""
    T, heads = len(h_TD), indexer.heads
    q_TIH = row_dot(query_TC, weights.query).reshape(T, heads, indexer.d_key)
    key_TH = layer_norm(row_dot(h_TD, weights.key), weights.norm, weights.norm_bias, indexer.norm_eps)
    scale = (indexer.d_key * heads) ** -0.5
    return IndexRows(
        q=rotate(q_TIH, positions_T, cfg),
        weights=row_dot(h_TD, weights.weigh) * scale,
        key=rotate(key_TH[:, None], positions_T, cfg)[:, 0],
    )


def index_scores(
    q_ZQIH: Float[ArrayLike, "Z Q I H"], weights_ZQI: Float[ArrayLike, "Z Q I"], keys_ZSH: Float[ArrayLike, "Z S H"]
) -> Float[jax.Array, "Z Q S"]:
    """The scores of positions, summed in an order that depends on the number of heads and their size alone."""
    meet_ZQIS = ordered_sum(q_ZQIH[:, :, :, None] * keys_ZSH[:, None, None])
    return ordered_sum((weights_ZQI[..., None] * jax.nn.relu(meet_ZQIS)).swapaxes(-1, -2))


def best_positions(
    scores_ZQS: Float[ArrayLike, "Z Q S"], positions_ZQ: Int[ArrayLike, "Z Q"], chosen: int
) -> Bool[jax.Array, "Z Q S"]:
    """True for the `chosen` positions with the best scores, among the positions that each query may see."""
    Z, Q, S = scores_ZQS.shape
    seen_ZQS = jnp.arange(S) <= positions_ZQ[..., None]
    if chosen >= S:
        return seen_ZQS
    best_ZQX = lax.top_k(jnp.where(seen_ZQS, scores_ZQS, -jnp.inf), chosen)[1]
    z, q = jnp.arange(Z)[:, None, None], jnp.arange(Q)[:, None]
    return jnp.zeros((Z, Q, S), bool).at[z, q, best_ZQX].set(True) & seen_ZQS
