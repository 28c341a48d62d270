"""Tensor groups: ranks that compute attention together, each with a shard of the heads for all of their rows.

Every row belongs to one rank of its group, which does everything with it except attention. For attention the ranks of a
group send one another their rows and where those are cached. Each computes the output of its own heads for all of them
and gets back the parts of its own rows, which it sums in the order of the shards. So the sums do not depend on which
rank has which shard.

A rank keeps the keys and values of its own heads for the pages of every member: those of member t are the t-th part of
its entries. Which ranks are a group is an argument of a step, not a constant: a new grouping compiles nothing.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Int, Shaped

from moejax.config.axes import ArrayLike
from moejax.config.model_config import ModelConfig
from moejax.config.params import Layer, Params, first_layer, map_layers
from moejax.config.step_inputs import Bucket, StepInputs, idle_inputs, unpack
from moejax.model.exchange import Exchange, all_to_all


@struct.dataclass
class TensorGroup:
    """The tensor group of a rank in one step. On a rank in no group all inputs are idle."""

    tp_peers: Int[ArrayLike, " members"]
    """Positions of the members in the mesh, in the order of their shards; -1 on a rank that is in no group."""
    packed: Int[ArrayLike, " packed"]
    """Packed inputs of all members, one after the other."""
    inputs: tuple[StepInputs, ...]
    """The inputs of each member."""


def gather_group(
    packed: Int[ArrayLike, " size"], peers_T: Int[ArrayLike, " T"], bucket: Bucket, exchange: Exchange
) -> TensorGroup:
    """Exchange the packed inputs of a step among the members of a group.

    Pages are those of the cache of this rank's shard: of member t, in the t-th part.
    """
    all_packed = group_all_to_all(jnp.broadcast_to(packed, (len(peers_T), *packed.shape)), peers_T, exchange)
    all_packed = jnp.where(peers_T[:, None] >= 0, all_packed, idle_inputs(bucket))
    inputs = tuple(unpack(each, bucket) for each in all_packed)
    return TensorGroup(tp_peers=peers_T, packed=all_packed.reshape(-1), inputs=inputs)


def group_all_to_all(
    parts_T: Shaped[ArrayLike, "T ..."], peers_T: Int[ArrayLike, " T"], exchange: Exchange
) -> Shaped[ArrayLike, "T ..."]:
    """Send part t to member t of the group; part t of the result came from member t. Zeros on a rank without a
    group."""
    to_nT = jnp.arange(exchange.ranks)[:, None] == peers_T
    sent_n = _where(to_nT.any(1), parts_T[to_nT.argmax(1)])
    return _where(peers_T >= 0, all_to_all(sent_n, exchange)[jnp.maximum(peers_T, 0)])


def finite_in_group(finite_TR: Bool[ArrayLike, " TR"], group: TensorGroup, exchange: Exchange) -> Bool[ArrayLike, " R"]:
    """True for those of this rank's rows for which every member's keys and values are finite.

    `finite_TR` is what this rank found for the rows of all members, one member after the other.
    """
    by_member = finite_TR.reshape(len(group.inputs), -1).astype(jnp.float32)
    return (group_all_to_all(by_member, group.tp_peers, exchange) > 0).all(0)


def tp_shard_of(params: Params, shard: int, cfg: ModelConfig) -> Params:
    """The part of a model's weights without experts, as host arrays, that the rank with this shard holds.

    `cfg` is that of one shard (`ModelConfig.tp_shard`). Nothing is copied but matrices of attention.
    """
    of_layer = lambda position: cfg.of_layer(first_layer(cfg, position))  # noqa: E731
    return map_layers(params, lambda position, layer: _layer_shard(layer, shard, of_layer(position)))


def _layer_shard(layer: Layer, shard: int, cfg: ModelConfig) -> Layer:
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    sizes = [cfg.tensor * rows for rows in (N * H, K * H, K * cfg.value_size)]

    def of_heads(value: np.ndarray | None, axis: int, size: int) -> np.ndarray | None:
        return None if value is None else np.take(value, range(shard * size, (shard + 1) * size), axis)

    def of_qkv(value: np.ndarray | None) -> np.ndarray | None:
        if value is None:
            return None
        q, k, v = np.split(value, np.cumsum(sizes)[:2], axis=1)
        parts = [np.split(each, cfg.tensor, axis=1)[shard] for each in (q, k, v)]
        return np.concatenate(parts, axis=1)

    return dataclasses.replace(
        layer,
        qkv=of_qkv(layer.qkv),
        qkv_bias=of_qkv(layer.qkv_bias),
        out=of_heads(layer.out, 2, N * cfg.value_size),
        sinks=of_heads(layer.sinks, 1, N),
        attention_gate=of_heads(layer.attention_gate, 1, N if cfg.gate_by_head else N * cfg.value_size),
    )


def _where(which_n: Bool[ArrayLike, " n"], values_n: Shaped[ArrayLike, "n ..."]) -> Shaped[ArrayLike, "n ..."]:
    return jnp.where(which_n.reshape(-1, *(1,) * (values_n.ndim - 1)), values_n, jnp.zeros((), values_n.dtype))
