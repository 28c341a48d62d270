"""Tensor groups: ranks that attend together, each with a share of the heads of all their rows.

Every row has one rank of its group, which does all with it but attention. For attention the ranks of a group tell one
another their rows and where those are cached, each computes what its own heads add to all of them, and each gets back
the parts of its rows, which it sums in order of the shares. So the sums do not depend on where a share lies.

A rank keeps the keys and values of its own heads, of the pages of every member: those of member t are the t-th part of
its entries. Which ranks are a group is an argument of a step, not a constant: to regroup compiles nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moejax.config import ModelConfig
from moejax.exchange import Exchange, all_to_all
from moejax.inputs import Bucket, StepInputs, idle, unpack
from moejax.params import Layer, Params


@struct.dataclass
class Group:
    """A tensor group in one step: `mates [T]`, where its members are in the mesh, in order of their shares, -1 on a
    rank that is in none; what all of them got for the step, packed, one after the other; and the same of each."""

    mates: Any
    packed: Any
    inputs: tuple[StepInputs, ...]


def meet(packed: jax.Array, mates_T: jax.Array, bucket: Bucket, exchange: Exchange) -> Group:
    """What the members of a group got for a step, told to one another. Pages are those of the cache of this rank's
    share: of the t-th member, in the t-th part."""
    all_packed = swap(jnp.broadcast_to(packed, (len(mates_T), *packed.shape)), mates_T, exchange)
    all_packed = jnp.where(mates_T[:, None] >= 0, all_packed, idle(bucket))
    inputs = tuple(unpack(each, bucket) for each in all_packed)
    return Group(mates=mates_T, packed=all_packed.reshape(-1), inputs=inputs)


def swap(parts_T: jax.Array, mates_T: jax.Array, exchange: Exchange) -> jax.Array:
    """Part t to member t of the group; part t of the result came from member t. Zeros on a rank that is in no group."""
    to_nT = jnp.arange(exchange.ranks)[:, None] == mates_T
    sent_n = _where(to_nT.any(1), parts_T[to_nT.argmax(1)])
    return _where(mates_T >= 0, all_to_all(sent_n, exchange)[jnp.maximum(mates_T, 0)])


def sound_in_group(sound_TR: jax.Array, group: Group, exchange: Exchange) -> jax.Array:
    """Of which of this rank's rows all that the group has made is sound, bool `[R]`; from what each rank has of the
    rows of all members, one after the other `[T * R]`."""
    by_member = sound_TR.reshape(len(group.inputs), -1).astype(jnp.float32)
    return (swap(by_member, group.mates, exchange) > 0).all(0)


def share_of(params: Params, shard: int, cfg: ModelConfig) -> Params:
    """Of the weights that are no experts, as host arrays, what a rank that has the share `shard` holds; `cfg` is that
    of a share. Nothing is copied but matrices of attention."""
    return params.replace(
        segments=tuple(tuple(_layer_share(each, shard, cfg) for each in segment) for segment in params.segments)
    )


def _layer_share(layer: Layer, shard: int, cfg: ModelConfig) -> Layer:
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    sizes = [cfg.tensor * heads * H for heads in (N, K, K)]

    def of_heads(value: np.ndarray | None, axis: int, size: int) -> np.ndarray | None:
        return None if value is None else np.take(value, range(shard * size, (shard + 1) * size), axis)

    def of_qkv(value: np.ndarray | None) -> np.ndarray | None:
        if value is None:
            return None
        q, k, v = np.split(value, np.cumsum(sizes)[:2], axis=1)
        parts = [of_heads(each, 1, size // cfg.tensor) for each, size in zip((q, k, v), sizes, strict=True)]
        return np.concatenate(parts, axis=1)

    return layer.replace(
        qkv=of_qkv(layer.qkv),
        qkv_bias=of_qkv(layer.qkv_bias),
        out=of_heads(layer.out, 2, N * H),
        sinks=of_heads(layer.sinks, 1, N),
    )


def _where(which: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(which.reshape(-1, *(1,) * (values.ndim - 1)), values, jnp.zeros((), values.dtype))
