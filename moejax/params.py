"""Every parameter once, as data: shape, what its axes mean, how it starts. All else is a map over this.

Weights lie `[out, in]`, as in the checkpoints models are published in; why it matters here: `layers.row_dot`.

Shape suffixes: B batch, T query tokens, S key/value tokens, D model, F feed-forward, V vocabulary,
N heads, K kv heads, H head size, E logical experts, P physical slots, X experts per token, L layers,
M cache pages. R stands for the repeats of a segment (the scanned axis).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.config import ModelConfig


@struct.dataclass
class FeedForward:
    """SwiGLU weights: gate above up `[..., 2F, D]`, down `[..., D, F]`."""

    gate_up: Any
    down: Any


@struct.dataclass
class MoE:
    """Router `[R, E, D]` and its bias `[R, E]`, an always-on expert or None, and the routed experts.

    `experts` leaves are `[R, E, 2F, D]`, `[R, E, D, F]` in a checkpoint, and `[R, S, ...]` in a rank, which
    holds slots.
    """

    router: Any
    bias: Any
    shared: FeedForward | None
    experts: FeedForward


@struct.dataclass
class Layer:
    """One decoder layer: exactly one of `ffn` and `moe` is there."""

    attention_norm: Any
    qkv: Any
    out: Any
    ffn_norm: Any
    ffn: FeedForward | None
    moe: MoE | None


@struct.dataclass
class Params:
    """A whole model. `segments[i][j]` is position j of segment i's pattern, its leaves stacked over repeats."""

    embed: Any
    final_norm: Any
    head: Any
    segments: tuple[tuple[Layer, ...], ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, names of its logical axes, standard deviation at the start (0: ones)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        n = 1
        for s in self.shape:
            n *= s
        return n


def param_specs(cfg: ModelConfig) -> Params:
    """The tree of ParamSpec of a model, experts in logical order."""
    D, V, N, K, H = cfg.d_model, cfg.vocab_size, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    out_std = 0.02 / (2 * cfg.n_layers) ** 0.5

    def feed_forward(lead: tuple[int, ...], names: tuple[str, ...], width: int) -> FeedForward:
        return FeedForward(
            gate_up=ParamSpec((*lead, 2 * width, D), (*names, "ffn", "model"), 0.02),
            down=ParamSpec((*lead, D, width), (*names, "model", "ffn"), out_std),
        )

    def layer(kind: str, R: int) -> Layer:
        moe = cfg.moe if kind == "moe" else None
        return Layer(
            attention_norm=ParamSpec((R, D), ("layer", "model"), 0),
            qkv=ParamSpec((R, (N + 2 * K) * H, D), ("layer", "heads", "model"), 0.02),
            out=ParamSpec((R, D, N * H), ("layer", "model", "heads"), out_std),
            ffn_norm=ParamSpec((R, D), ("layer", "model"), 0),
            ffn=feed_forward((R,), ("layer",), cfg.d_ff) if moe is None else None,
            moe=None
            if moe is None
            else MoE(
                router=ParamSpec((R, moe.experts, D), ("layer", "router", "model"), 0.02),
                bias=ParamSpec((R, moe.experts), ("layer", "router"), 1e-9),
                shared=feed_forward((R,), ("layer",), moe.d_shared) if moe.d_shared else None,
                experts=feed_forward((R, moe.experts), ("layer", "expert"), moe.d_expert),
            ),
        )

    return Params(
        embed=ParamSpec((V, D), ("vocab", "model"), 0.02),
        final_norm=ParamSpec((D,), ("model",), 0),
        head=None if cfg.tied_head else ParamSpec((V, D), ("vocab", "model"), 0.02),
        segments=tuple(tuple(layer(kind, repeats) for kind in pattern) for pattern, repeats in cfg.segments),
    )


def is_spec(x: Any) -> bool:
    """True for the leaves of `param_specs`."""
    return isinstance(x, ParamSpec)


def init_params(cfg: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters of a model, experts in logical order."""
    specs, tree = jax.tree.flatten(param_specs(cfg), is_leaf=is_spec)
    keys = jax.random.split(key, len(specs))
    leaves = [
        jnp.ones(s.shape, dtype) if s.std == 0 else s.std * jax.random.normal(k, s.shape, dtype)
        for s, k in zip(specs, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def expert_bytes(cfg: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of one routed expert of one layer."""
    return 0 if cfg.moe is None else 3 * cfg.d_model * cfg.moe.d_expert * itemsize


def parameter_count(cfg: ModelConfig) -> int:
    """All parameters of a model, every expert counted once."""
    return sum(s.size for s in jax.tree.leaves(param_specs(cfg), is_leaf=is_spec))
