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

from moejax.config import LatentConfig, LayerKind, ModelConfig, in_slots


@struct.dataclass
class FeedForward:
    """SwiGLU weights: gate above up `[..., 2F, D]`, down `[..., D, F]`; biases `[..., 2F]`, `[..., D]` or None."""

    gate_up: Any
    down: Any
    gate_up_bias: Any = None
    down_bias: Any = None


@struct.dataclass
class MoE:
    """Router `[R, E, D]` and its bias `[R, E]`, an always-on expert or None, and the routed experts. A divided dense
    layer has its shards for experts, and no router.

    `experts` leaves are `[R, E, 2F, D]`, `[R, E, D, F]` in a checkpoint, and `[R, S, ...]` in a rank, which
    holds slots. `shared_gate [R, 1, D]` weighs the always-on expert, or is None.
    """

    router: Any
    bias: Any
    shared: FeedForward | None
    experts: FeedForward
    shared_gate: Any = None


@struct.dataclass
class Latent:
    """Multi-head latent attention. `query [R, N * (plain + rope), D or d_query]`, after `query_down [R, d_query, D]`
    and its norm if there are; `down [R, d_latent + d_rope, D]` makes the latent, which is normed, and the key to
    rotate; per head, `key_up [R, N, d_latent, plain]` takes queries to the latent and `value_up [R, N, d_value,
    d_latent]` the mixed latent to values."""

    query: Any
    query_down: Any
    query_norm: Any
    down: Any
    norm: Any
    key_up: Any
    value_up: Any


@struct.dataclass
class Layer:
    """One decoder layer: exactly one of `ffn` and `moe` is there, one of `qkv` and `latent`, and biases, norms and
    sinks as the configuration says."""

    attention_norm: Any
    qkv: Any
    out: Any
    ffn_norm: Any
    ffn: FeedForward | None
    moe: MoE | None
    latent: Latent | None = None
    qkv_bias: Any = None
    out_bias: Any = None
    query_norm: Any = None
    key_norm: Any = None
    sinks: Any = None
    attention_norm_bias: Any = None
    ffn_norm_bias: Any = None


@struct.dataclass
class Params:
    """A whole model. `segments[i][j]` is position j of segment i's pattern, its leaves stacked over repeats."""

    embed: Any
    final_norm: Any
    head: Any
    segments: tuple[tuple[Layer, ...], ...]
    final_norm_bias: Any = None
    head_bias: Any = None

    @property
    def logits(self) -> "Head":
        """The head, or the embedding in its place."""
        return Head(weight=self.embed if self.head is None else self.head, bias=self.head_bias)


@struct.dataclass
class Head:
    """What makes logits of hidden rows: a weight `[V, D]`, and a bias `[V]` or None."""

    weight: Any
    bias: Any = None


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, names of its logical axes, standard deviation at the start (0: ones; `BIAS`: near 0)."""

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


BIAS = 1e-9
"""Standard deviation of what starts at zero."""


def param_specs(cfg: ModelConfig) -> Params:
    """The tree of ParamSpec of a model, experts in logical order."""
    V, D = cfg.vocab_size, cfg.d_model
    layer_norm = cfg.norm == "layer"
    return Params(
        embed=ParamSpec((V, D), ("vocab", "model"), 0.02),
        final_norm=ParamSpec((D,), ("model",), 0),
        head=None if cfg.tied_head else ParamSpec((V, D), ("vocab", "model"), 0.02),
        segments=tuple(tuple(_layer(cfg, kind, repeats) for kind in pattern) for pattern, repeats in cfg.segments),
        final_norm_bias=ParamSpec((D,), ("model",), BIAS) if layer_norm else None,
        head_bias=ParamSpec((V,), ("vocab",), BIAS) if cfg.head_bias else None,
    )


def _layer(cfg: ModelConfig, kind: LayerKind, R: int) -> Layer:
    D, N, K, H = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    norm = ParamSpec((R, D), ("layer", "model"), 0)
    norm_bias = ParamSpec((R, D), ("layer", "model"), BIAS) if cfg.norm == "layer" else None
    latent = cfg.latent
    mixed = N * (H if latent is None else latent.d_value)
    normed = {"none": (0, 0), "head": (H, H), "all": (N * H, K * H)}[cfg.qk_norm]
    query_norm, key_norm = (ParamSpec((R, size), ("layer", "heads"), 0) if size else None for size in normed)
    return Layer(
        attention_norm=norm,
        qkv=None if latent else ParamSpec((R, (N + 2 * K) * H, D), ("layer", "heads", "model"), 0.02),
        out=ParamSpec((R, D, mixed), ("layer", "model", "heads"), _out_std(cfg)),
        ffn_norm=norm,
        ffn=_feed_forward(cfg, (R,), ("layer",), cfg.d_ff) if kind == "dense" else None,
        moe=_moe(cfg, kind, R) if in_slots(kind) else None,
        latent=_latent(cfg, latent, R) if latent else None,
        qkv_bias=ParamSpec((R, (N + 2 * K) * H), ("layer", "heads"), BIAS) if cfg.qkv_bias else None,
        out_bias=ParamSpec((R, D), ("layer", "model"), BIAS) if cfg.out_bias else None,
        query_norm=query_norm,
        key_norm=key_norm,
        sinks=ParamSpec((R, N), ("layer", "heads"), BIAS) if cfg.sinks else None,
        attention_norm_bias=norm_bias,
        ffn_norm_bias=norm_bias,
    )


def _latent(cfg: ModelConfig, latent: LatentConfig, R: int) -> Latent:
    N, D, Q, C = cfg.n_heads, cfg.d_model, latent.d_query, latent.d_latent
    low = ("layer", "latent", "model")
    return Latent(
        query=ParamSpec((R, N * cfg.d_head, Q or D), ("layer", "heads", "latent" if Q else "model"), 0.02),
        query_down=ParamSpec((R, Q, D), low, 0.02) if Q else None,
        query_norm=ParamSpec((R, Q), ("layer", "latent"), 0) if Q else None,
        down=ParamSpec((R, C + latent.d_rope, D), low, 0.02),
        norm=ParamSpec((R, C), ("layer", "latent"), 0),
        key_up=ParamSpec((R, N, C, latent.d_plain), ("layer", "heads", "latent", "head"), 0.02),
        value_up=ParamSpec((R, N, latent.d_value, C), ("layer", "heads", "head", "latent"), 0.02),
    )


def _moe(cfg: ModelConfig, kind: LayerKind, R: int) -> MoE:
    moe, routed = cfg.experts_of(kind), kind == "moe"
    D, E = cfg.d_model, moe.experts
    return MoE(
        router=ParamSpec((R, E, D), ("layer", "router", "model"), 0.02) if routed else None,
        bias=ParamSpec((R, E), ("layer", "router"), BIAS) if routed else None,
        shared=_feed_forward(cfg, (R,), ("layer",), moe.d_shared) if moe.d_shared else None,
        experts=_feed_forward(cfg, (R, E), ("layer", "expert"), moe.d_expert, biased=moe.expert_bias),
        shared_gate=ParamSpec((R, 1, D), ("layer", "router", "model"), 0.02) if moe.shared_gate else None,
    )


def _feed_forward(
    cfg: ModelConfig, lead: tuple[int, ...], names: tuple[str, ...], width: int, *, biased: bool = False
) -> FeedForward:
    D = cfg.d_model
    return FeedForward(
        gate_up=ParamSpec((*lead, 2 * width, D), (*names, "ffn", "model"), 0.02),
        down=ParamSpec((*lead, D, width), (*names, "model", "ffn"), _out_std(cfg)),
        gate_up_bias=ParamSpec((*lead, 2 * width), (*names, "ffn"), BIAS) if biased else None,
        down_bias=ParamSpec((*lead, D), (*names, "model"), BIAS) if biased else None,
    )


def _out_std(cfg: ModelConfig) -> float:
    return 0.02 / (2 * cfg.n_layers) ** 0.5


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
    """Bytes of one expert of one layer, the largest of the model, all its numbers of this size."""
    return itemsize * max((_expert_size(cfg, kind) for kind in set(cfg.layer_kinds) if in_slots(kind)), default=0)


def expert_counts(cfg: ModelConfig) -> tuple[int, int]:
    """Parameters of all experts of a model, and of those that one token goes to."""
    kinds = [kind for kind in cfg.layer_kinds if in_slots(kind)]
    of = [(cfg.experts_of(kind), _expert_size(cfg, kind)) for kind in kinds]
    return sum(moe.experts * size for moe, size in of), sum(moe.experts_per_token * size for moe, size in of)


def _expert_size(cfg: ModelConfig, kind: LayerKind) -> int:
    moe = cfg.experts_of(kind)
    one = _feed_forward(cfg, (), (), moe.d_expert, biased=moe.expert_bias)
    return sum(s.size for s in jax.tree.leaves(one, is_leaf=is_spec))


def parameter_count(cfg: ModelConfig) -> int:
    """All parameters of a model, every expert counted once."""
    return sum(s.size for s in jax.tree.leaves(param_specs(cfg), is_leaf=is_spec))
