"""The router: the experts of each token, and the gate of each."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.moe_config import MoEConfig
from moejax.model.layers import Weight, ordered_sum, row_dot


def route(
    x_TD: Float[ArrayLike, "T D"],
    router_ED: Weight,
    bias_E: Float[ArrayLike, " E"],
    alive_E: Bool[ArrayLike, " E"],
    moe: MoEConfig,
    scale_E: Float[ArrayLike, " E"] | None = None,
) -> tuple[Int[ArrayLike, "T X"], Float[ArrayLike, "T X"]]:
    """The chosen experts in router order and their gates, as `moe.gate` says (see MoEConfig), multiplied by the numbers
    `scale_E` of the experts if there are any.

    `alive_E` is False for masked experts: the next best expert takes over. Ties go to the expert of the lower number,
    so that every rank chooses alike.
    """
    chosen_TX, gates_TX = _choose(row_dot(x_TD, router_ED).astype(jnp.float32), bias_E, alive_E, moe)
    return chosen_TX, gates_TX if scale_E is None else gates_TX * scale_E[chosen_TX]


def _choose(
    logits_TE: Float[ArrayLike, "T E"], bias_E: Float[ArrayLike, " E"], alive_E: Bool[ArrayLike, " E"], moe: MoEConfig
) -> tuple[Int[ArrayLike, "T X"], Float[ArrayLike, "T X"]]:
    """The chosen experts and their gates."""
    if moe.logit_cap is not None:
        logits_TE = moe.logit_cap * jnp.tanh(logits_TE / moe.logit_cap)
    if moe.gate == "sparsemixer":
        return _sparsemixer(jnp.where(alive_E, logits_TE + bias_E, -jnp.inf), moe)
    scores_TE = _scores(logits_TE, moe)
    choice_TE = jnp.where(alive_E, scores_TE + bias_E, -jnp.inf)
    allowed_TE = choice_TE if moe.groups == 1 else _in_best_groups(choice_TE, moe)
    best_TX, chosen_TX = jax.lax.top_k(allowed_TE, moe.experts_per_token)
    if moe.gate == "softmax":
        gates_TX = jax.nn.softmax(best_TX, axis=-1)
    elif moe.gate == "share":
        highest_T1 = choice_TE.max(-1, keepdims=True)
        gates_TX = jnp.exp(best_TX - highest_T1) / ordered_sum(jnp.exp(choice_TE - highest_T1))[:, None]
    elif moe.gate == "input_sigmoid":
        gates_TX = jax.nn.sigmoid(best_TX)
    else:
        full_TX = jnp.ones_like(best_TX) if moe.gate == "one" else jnp.take_along_axis(scores_TE, chosen_TX, axis=-1)
        gates_TX = jnp.where(jnp.isfinite(best_TX), full_TX, 0.0)
    return chosen_TX, _scaled(gates_TX, moe)


def _scores(logits_TE: Float[ArrayLike, "T E"], moe: MoEConfig) -> Float[ArrayLike, "T E"]:
    """The scores of the experts: the router's bias is added to them for the choice, gates are made of them alone."""
    if moe.gate == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    if moe.gate != "biased_share":
        return logits_TE
    share_TE = jnp.exp(logits_TE - logits_TE.max(-1, keepdims=True))
    return share_TE / ordered_sum(share_TE)[:, None]


def _scaled(gates_TX: Float[ArrayLike, "T X"], moe: MoEConfig) -> Float[ArrayLike, "T X"]:
    if moe.normalised:
        gates_TX = gates_TX / (ordered_sum(gates_TX)[:, None] + moe.sum_epsilon)
    return gates_TX if moe.gate_scale == 1.0 else gates_TX * moe.gate_scale


def _in_best_groups(choice_TE: Float[ArrayLike, "T E"], moe: MoEConfig) -> Float[ArrayLike, "T E"]:
    """Scores outside the best groups set to minus infinity (DeepSeek-V2, section 2.2.2; V3, section 2.1.2)."""
    size = moe.experts // moe.groups
    by_group = choice_TE.reshape(-1, moe.groups, size)
    counted = min(1 if moe.gate == "share" else 2, size)
    group_TG = jax.lax.top_k(by_group, counted)[0].sum(-1)
    used = jax.lax.top_k(group_TG, moe.groups_used)[1]
    in_TG = (used[..., None] == jnp.arange(moe.groups)).any(1)
    return jnp.where(jnp.repeat(in_TG, size, axis=1), choice_TE, -jnp.inf)


def _sparsemixer(
    scores_TE: Float[ArrayLike, "T E"], moe: MoEConfig
) -> tuple[Int[ArrayLike, "T X"], Float[ArrayLike, "T X"]]:
    """One expert after the other: the best of those left, weighed by a softmax over those left whose score is within
    twice the jitter of it (arXiv 2409.12136, at inference)."""
    left_TE, chosen, gates = scores_TE, [], []
    for _ in range(moe.experts_per_token):
        best_T1, expert_T = left_TE.max(-1, keepdims=True), left_TE.argmax(-1)
        distance_TE = (best_T1 - scores_TE) / jnp.maximum(jnp.abs(scores_TE), best_T1)
        near_TE = jnp.isfinite(left_TE) & ~(distance_TE > 2 * moe.jitter)
        total_T = ordered_sum(jnp.where(near_TE, jnp.exp(left_TE - best_T1), 0.0))
        chosen.append(expert_T)
        gates.append(jnp.where(jnp.isfinite(best_T1[:, 0]), 1.0 / total_T, 0.0))
        left_TE = jnp.where(jnp.arange(moe.experts) == expert_T[:, None], -jnp.inf, left_TE)
    return jnp.stack(chosen, -1), _scaled(jnp.stack(gates, -1), moe)
