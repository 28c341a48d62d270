"""The feed-forward part of a layer: dense, or routed to experts on all ranks.

A routed layer normalizes its rows, routes them, sends them to the ranks of their experts, and adds the gated sum of
what comes back. Attention ranks do the first and the last part by themselves (`moejax.model.disaggregated`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int

from moejax.config.axes import ArrayLike
from moejax.config.model_config import LayerKind, ModelConfig
from moejax.config.params import Layer
from moejax.config.step_inputs import StepInputs
from moejax.model.exchange import Exchange, combine, dispatch, locate
from moejax.model.experts import apply_experts, apply_shared_expert
from moejax.model.layers import feed_forward_of, norm, rms_norm, rounded, row_dot
from moejax.model.router import route
from moejax.model.step_shape import StepShape


def feed_forward(
    x_TD: Float[ArrayLike, "T D"], layer: Layer, inputs: StepInputs, cfg: ModelConfig
) -> Float[ArrayLike, "T D"]:
    """x plus the dense feed-forward part of a layer; x alone where it has none."""
    if layer.ffn is None:
        return x_TD
    h_TD = _normed(x_TD, layer, inputs, cfg)
    limit = cfg.moe.dense_limit if cfg.moe else None
    y_TD = feed_forward_of(h_TD, layer.ffn.gate_up, layer.ffn.down, cfg.activation, limit=limit)
    return finish_layer(add_residual(x_TD, finish_feed_forward(y_TD, layer.ffn_post_norm, cfg), cfg), layer.scale)


def routed_feed_forward(
    x_TD: Float[ArrayLike, "T D"],
    layer: Layer,
    kind: LayerKind,
    route_E: Int[ArrayLike, " E"],
    inputs: StepInputs,
    shape: StepShape,
) -> tuple[Float[ArrayLike, "T D"], Int[ArrayLike, " E"]]:
    """x plus the gated sum of its experts, and the rows sent to each expert. Rows of padding go nowhere. `shape` has
    the configuration as the layer sees it."""
    assert layer.moe is not None
    exchange, moe = shape.exchange_of(kind), shape.cfg.experts_of(kind)
    routed = route_tokens(x_TD, layer, route_E, inputs, exchange, shape.cfg)
    with jax.named_scope("dispatch"):
        rows_rD, wanted_rA = dispatch(routed.sent, routed.slot, routed.rank, routed.nth, exchange)
    with jax.named_scope("experts"):
        answers_rAD = apply_experts(rows_rD, wanted_rA, layer.moe.experts, shape.slots, moe)
    with jax.named_scope("combine"):
        experts_TD = combine(answers_rAD, routed.rank, routed.nth, routed.gates, exchange)
    if layer.moe.latent_out is not None:
        experts_TD = row_dot(experts_TD, layer.moe.latent_out)
    shared_TD = shared_expert(routed.h, layer, kind, shape.cfg)
    return add_expert_outputs(x_TD, experts_TD, shared_TD, LayerEnd.of(layer), shape.cfg), routed.load


@struct.dataclass
class LayerEnd:
    """The vectors that the output of a routed layer is normed and multiplied with, each None where there is none.
    Leaves are arrays or shapes."""

    experts_norm: Any
    """Scale of the norm of the routed experts' sum `[D]`."""
    post_norm: Any
    """Scale of the norm of the output of all experts `[D]`."""
    scale: Any
    """Factor of the layer `[1]`."""

    @classmethod
    def of(cls, layer: Layer) -> "LayerEnd":
        """Those of a layer with experts."""
        assert layer.moe is not None
        return cls(experts_norm=layer.moe.post_norm, post_norm=layer.ffn_post_norm, scale=layer.scale)


class PartRows(NamedTuple):
    """Normed rows `[T, D]` as the parts of a routed layer take them: the same, unless the model has norms of their own
    (`MoEConfig.own_norms`)."""

    experts: Float[ArrayLike, "T D"]
    shared: Float[ArrayLike, "T D"]
    router: Float[ArrayLike, "T D"]

    @classmethod
    def of(cls, x_TD: Float[ArrayLike, "T D"], layer: Layer, cfg: ModelConfig) -> "PartRows":
        """The rows `x` of the residual stream, normed."""
        moe = layer.moe
        h_TD = norm(x_TD, layer.ffn_norm, layer.ffn_norm_bias, cfg.norm_eps)
        if moe is None or moe.router_norm is None:
            return cls(h_TD, h_TD, h_TD)
        shared_TD = rms_norm(x_TD, moe.shared_norm, cfg.norm_eps)
        return cls(h_TD, shared_TD, rms_norm(x_TD, moe.router_norm, cfg.norm_eps) * cfg.d_model**-0.5)


@struct.dataclass
class RoutedTokens:
    """Normed rows on their way to their experts. X experts of each row, in router order."""

    h: Float[ArrayLike, "T D"]
    """The rows as the shared expert takes them."""
    sent: Float[ArrayLike, "T C"]
    """The rows as experts get them, in their latent if they have one."""
    slot: Int[ArrayLike, "T X"]
    """Physical slot of each chosen expert; -1 for none."""
    rank: Int[ArrayLike, "T X"]
    """Rank of that slot; -1 for none."""
    nth: Int[ArrayLike, "T X"]
    """Which of the row's answers from that rank this expert's is."""
    gates: Float[ArrayLike, "T X"]
    load: Int[ArrayLike, " E"]
    """Rows sent to each expert."""


def route_tokens(
    x_TD: Float[ArrayLike, "T D"],
    layer: Layer,
    route_E: Int[ArrayLike, " E"],
    inputs: StepInputs,
    exchange: Exchange,
    cfg: ModelConfig,
) -> RoutedTokens:
    """Norm and router. `route_E` has the physical slot that this rank uses of each expert, -1 where it is masked.

    A sharded dense layer has no router: its rows go to all of its shards.
    """
    assert layer.moe is not None
    moe, experts = layer.moe, route_E.shape[0]
    real_T1 = inputs.positions[:, None] >= 0
    h_TD, shared_TD, router_TD = (jnp.where(real_T1, rows, 0) for rows in PartRows.of(x_TD, layer, cfg))
    with jax.named_scope("route"):
        if moe.router is None:
            chosen_TX = jnp.broadcast_to(jnp.arange(experts), (len(h_TD), experts))
            gates_TX = jnp.ones(chosen_TX.shape, jnp.float32)
        else:
            own = cfg.experts_of("moe")
            chosen_TX, gates_TX = route(router_TD, moe.router, moe.bias, route_E >= 0, own, moe.expert_scale)
        slot_TX = jnp.where(real_T1, route_E[chosen_TX], -1)
        load_E = ((chosen_TX[..., None] == jnp.arange(experts)) & real_T1[..., None]).sum((0, 1))
        rank_TX, nth_TX = locate(slot_TX, exchange)
        sent_TD = h_TD if moe.latent_in is None else row_dot(h_TD, moe.latent_in)
        if moe.router is not None and cfg.experts_of("moe").gate == "input_sigmoid":
            sent_TD, gates_TX = h_TD * gates_TX, jnp.ones_like(gates_TX)
    return RoutedTokens(h=shared_TD, sent=sent_TD, slot=slot_TX, rank=rank_TX, nth=nth_TX, gates=gates_TX, load=load_E)


def shared_expert(
    h_TD: Float[ArrayLike, "T D"], layer: Layer, kind: LayerKind, cfg: ModelConfig
) -> Float[ArrayLike, "T D"] | None:
    """Outputs of the shared expert of a layer of this kind for normed rows; None if the layer has none."""
    if layer.moe is None or layer.moe.shared is None:
        return None
    with jax.named_scope("shared"):
        y_TD = apply_shared_expert(h_TD, layer.moe, cfg.experts_of(kind))
        return finish_feed_forward(y_TD, layer.moe.shared_post_norm, cfg)


def add_expert_outputs(
    x_TD: Float[ArrayLike, "T D"],
    experts_TD: Float[ArrayLike, "T D"],
    shared_TD: Float[ArrayLike, "T D"] | None,
    end: LayerEnd,
    cfg: ModelConfig,
) -> Float[ArrayLike, "T D"]:
    """x plus the outputs of its routed experts and of the shared expert."""
    if end.experts_norm is not None:
        experts_TD = finish_feed_forward(rounded(experts_TD), end.experts_norm, cfg)
    y_TD = experts_TD if shared_TD is None else experts_TD + shared_TD
    return finish_layer(add_residual(x_TD, finish_feed_forward(y_TD, end.post_norm, cfg), cfg), end.scale)


def finish_feed_forward(
    y_TD: Float[ArrayLike, "T D"], post_norm_D: Float[ArrayLike, " D"] | None, cfg: ModelConfig
) -> Float[ArrayLike, "T D"]:
    """The output of the feed-forward part, normed if the model does so."""
    return y_TD if post_norm_D is None else rounded(rms_norm(y_TD, post_norm_D, cfg.norm_eps))


def finish_layer(x_TD: Float[ArrayLike, "T D"], scale: Float[ArrayLike, " 1"] | None) -> Float[ArrayLike, "T D"]:
    """The output of a layer, multiplied by its number if it has one."""
    return x_TD if scale is None else rounded(x_TD * scale)


def add_residual(
    x_TD: Float[ArrayLike, "T D"], y_TD: Float[ArrayLike, "T D"], cfg: ModelConfig
) -> Float[ArrayLike, "T D"]:
    """x plus the output of a part of a layer, scaled as the model does (`ModelConfig.residual_scale`)."""
    return x_TD + y_TD if cfg.residual_scale == 1.0 else x_TD + cfg.residual_scale * y_TD


def _normed(
    x_TD: Float[ArrayLike, "T D"], layer: Layer, inputs: StepInputs, cfg: ModelConfig
) -> Float[ArrayLike, "T D"]:
    """The input of a dense feed-forward part: normed rows, zero for padding."""
    h_TD = norm(x_TD, layer.ffn_norm, layer.ffn_norm_bias, cfg.norm_eps)
    return jnp.where(inputs.positions[:, None] >= 0, h_TD, 0)
