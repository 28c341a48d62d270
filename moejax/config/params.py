"""Every parameter once, as data: shape, names of its axes, initial values. All else is a map over this.

Weights lie `[out, in]`, as in published checkpoints; `moejax.model.layers.row_dot` says why it matters here.

Shape suffixes are explained in `moejax.config.axes`; R here stands for the repeats of a segment (the scanned axis).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.config.attention_config import IndexerConfig, LatentConfig
from moejax.config.model_config import STATE_MIXERS, LayerKind, ModelConfig, in_slots
from moejax.config.moe_config import MoEConfig
from moejax.config.param_spec import BIAS_STD, ParamSpec
from moejax.config.state_params import ConvolutionWeights, DeltaNetWeights, KimiDeltaWeights, MambaWeights, state_specs
from planner.inputs.routed_experts import Activation, is_gated

Position = tuple[int, int]
"""A layer of a segment's pattern, which stands for all of its repeats: (segment, position in the pattern)."""


@struct.dataclass
class FeedForward:
    """SwiGLU or GEGLU weights: gate above up `[..., 2F, D]`, down `[..., D, F]`; biases `[..., 2F]`, `[..., D]` or
    None. Without a gate (`Activation` "relu2") `gate_up` is up alone, `[..., F, D]`."""

    gate_up: Any
    down: Any
    gate_up_bias: Any = None
    down_bias: Any = None


@struct.dataclass
class MoE:
    """Router `[R, E, D]` and its bias `[R, E]`, a shared expert or None, and the routed experts. A sharded dense layer
    has its shards for experts, and no router.

    `experts` leaves are `[R, E, 2F, D]`, `[R, E, D, F]` in a checkpoint, and `[R, P, ...]` in a rank, which holds
    slots. `shared_gate [R, 1, D]` weighs the shared expert, or is None. With experts in a latent of size C, which D is
    above then, `latent_in [R, C, D]` and `latent_out [R, D, C]` lead there and back.

    With norms of their own (`MoEConfig.own_norms`) `router_norm` is that of the rows that the router takes,
    `shared_norm` and `shared_post_norm` those before and after the shared expert, `post_norm` that of the sum of the
    routed ones, each `[R, D]`. `expert_scale [R, E]` multiplies the gates of each expert.
    """

    router: Any
    bias: Any
    shared: FeedForward | None
    experts: FeedForward
    shared_gate: Any = None
    latent_in: Any = None
    latent_out: Any = None
    router_norm: Any = None
    shared_norm: Any = None
    shared_post_norm: Any = None
    post_norm: Any = None
    expert_scale: Any = None


@struct.dataclass
class Latent:
    """Multi-head latent attention.

    `query [R, N * (plain + rope), D or d_query]` follows `query_down [R, d_query, D]` and its norm, if the model has
    them. `down [R, d_latent + d_rope, D]` makes the latent, which is normed, and the key, which is rotated. Per head,
    `key_up [R, N, d_latent, plain]` takes queries to the latent and `value_up [R, N, d_value, d_latent]` takes the
    mixed latent to values.
    """

    query: Any
    query_down: Any
    query_norm: Any
    down: Any
    norm: Any
    key_up: Any
    value_up: Any


@struct.dataclass
class IndexerWeights:
    """An indexer (`moejax.model.indexer`): `query [R, heads * d_key, d_query]`, `key [R, d_key, D]` and its layer norm
    `[R, d_key]`, and how much each head counts, `weigh [R, heads, D]`."""

    query: Any
    key: Any
    norm: Any
    norm_bias: Any
    weigh: Any


@struct.dataclass
class Layer:
    """One decoder layer, or one position of a segment with its leaves stacked over repeats. It has either `ffn` or
    `moe`, or neither and no norm for them, one of `qkv`, `latent`, `delta`, `convolution`, `mamba` and `kimi_delta`,
    and biases, norms, sinks and gate as the configuration says. A layer with a state (one of the last four) has no
    other leaves of attention than its norm. `scale [R, 1]` multiplies the output of the layer."""

    attention_norm: Any
    qkv: Any
    out: Any
    ffn_norm: Any
    ffn: FeedForward | None
    moe: MoE | None
    latent: Latent | None = None
    indexer: IndexerWeights | None = None
    qkv_bias: Any = None
    out_bias: Any = None
    query_norm: Any = None
    key_norm: Any = None
    sinks: Any = None
    attention_norm_bias: Any = None
    ffn_norm_bias: Any = None
    attention_gate: Any = None
    attention_post_norm: Any = None
    ffn_post_norm: Any = None
    scale: Any = None
    delta: DeltaNetWeights | None = None
    convolution: ConvolutionWeights | None = None
    mamba: MambaWeights | None = None
    kimi_delta: KimiDeltaWeights | None = None

    @property
    def has_state(self) -> bool:
        """True for a layer whose context is a state in place of keys and values."""
        return any(each is not None for each in (self.delta, self.convolution, self.mamba, self.kimi_delta))


@struct.dataclass
class MTPWeights:
    """The parts of multi-token prediction besides its layer: norms of the embedding and of the hidden state `[D]`, the
    projection of both, one after the other, to the layer's input `[D, 2D]`, and the norm before the head `[D]`."""

    token_norm: Any
    hidden_norm: Any
    project: Any
    norm: Any


@struct.dataclass
class Params:
    """A whole model. `segments[i][j]` is position j of segment i's pattern, its leaves stacked over repeats. With `mtp`
    the last segment is the layer of multi-token prediction."""

    embed: Any
    final_norm: Any
    head: Any
    segments: tuple[tuple[Layer, ...], ...]
    final_norm_bias: Any = None
    head_bias: Any = None
    mtp: MTPWeights | None = None
    logit_cap: float | None = struct.field(pytree_node=False, default=None)

    @property
    def logits(self) -> "Head":
        """The head, or the embedding in its place."""
        weight = self.embed if self.head is None else self.head
        return Head(weight=weight, bias=self.head_bias, cap=self.logit_cap)


@struct.dataclass
class Head:
    """The language-model head, from hidden rows to logits: a weight `[V, D]`, a bias `[V]` or None, and the cap of
    logits (`ModelConfig.logit_cap`)."""

    weight: Any
    bias: Any = None
    cap: float | None = struct.field(pytree_node=False, default=None)


def param_specs(cfg: ModelConfig) -> Params:
    """The tree of ParamSpec of a model, experts in logical order."""
    V, D = cfg.vocab_size, cfg.d_model
    layer_norm = cfg.norm == "layer"
    return Params(
        embed=ParamSpec((V, D), ("vocab", "model"), 0.02),
        final_norm=ParamSpec((D,), ("model",), 0),
        head=None if cfg.tied_head else ParamSpec((V, D), ("vocab", "model"), 0.02),
        segments=tuple(
            tuple(_layer(cfg, kind, repeats, (i, j)) for j, kind in enumerate(pattern))
            for i, (pattern, repeats) in enumerate(cfg.segments)
        ),
        final_norm_bias=ParamSpec((D,), ("model",), BIAS_STD) if layer_norm else None,
        head_bias=ParamSpec((V,), ("vocab",), BIAS_STD) if cfg.head_bias else None,
        mtp=_mtp(D) if cfg.mtp else None,
        logit_cap=cfg.logit_cap,
    )


def _mtp(D: int) -> MTPWeights:
    norm = ParamSpec((D,), ("model",), 0)
    project = ParamSpec((D, 2 * D), ("model", "pair"), 0.02)
    return MTPWeights(token_norm=norm, hidden_norm=norm, project=project, norm=norm)


def without_mtp(params: Params) -> Params:
    """The parameters without multi-token prediction."""
    return params if params.mtp is None else dataclasses.replace(params, mtp=None, segments=params.segments[:-1])


def has_state(cfg: ModelConfig, position: Position) -> bool:
    """True when the layers at a position have a state in place of keys and values."""
    return first_layer(cfg, position) in cfg.state_layers


def first_layer(cfg: ModelConfig, position: Position) -> int:
    """The first of the layers at a position, which are all alike (`ModelConfig.of_layer`)."""
    i, j = position
    return sum(len(pattern) * repeats for pattern, repeats in cfg.segments[:i]) + j


def _layer(model: ModelConfig, kind: LayerKind, R: int, position: Position) -> Layer:
    cfg = model.of_layer(first_layer(model, position))
    attention = _state_layer(cfg, R) if has_state(model, position) else _attention_layer(cfg, R)
    return dataclasses.replace(
        attention,
        ffn_norm=None if kind == "bare" else attention.ffn_norm,
        ffn=feed_forward_specs(cfg, (R,), ("layer",), cfg.d_ff, cfg.activation) if kind == "dense" else None,
        moe=_moe(cfg, kind, R) if in_slots(kind) else None,
        scale=ParamSpec((R, 1), ("layer", "rate"), 0) if cfg.layer_scales else None,
    )


def _state_layer(cfg: ModelConfig, R: int) -> Layer:
    """A layer with a state, without its feed-forward part."""
    norm = ParamSpec((R, cfg.d_model), ("layer", "model"), 0)
    layer = Layer(attention_norm=norm, qkv=None, out=None, ffn_norm=norm, ffn=None, moe=None)
    leaf = {"delta_net": "delta", "short_convolution": "convolution"}
    kind = next(kind for kind in STATE_MIXERS if getattr(cfg, kind) is not None)
    return dataclasses.replace(layer, **{leaf.get(kind, kind): state_specs(cfg, R, _out_std(cfg))})


def _attention_layer(cfg: ModelConfig, R: int) -> Layer:
    """A layer with attention, without its feed-forward part."""
    D, N, K, H = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    Hv = cfg.value_size
    norm = ParamSpec((R, D), ("layer", "model"), 0)
    norm_bias = ParamSpec((R, D), ("layer", "model"), BIAS_STD) if cfg.norm == "layer" else None
    latent = cfg.latent
    mixed = N * (Hv if latent is None else latent.d_value)
    gates, values = N if cfg.gate_by_head else mixed, 0 if cfg.keys_as_values else K * Hv
    normed = {"none": (0, 0), "head": (H, H), "all": (N * H, K * H), "l2": (0, 0)}[cfg.qk_norm]
    query_norm, key_norm = (ParamSpec((R, size), ("layer", "heads"), 0) if size else None for size in normed)
    return Layer(
        attention_norm=norm,
        qkv=None if latent else ParamSpec((R, (N + K) * H + values, D), ("layer", "heads", "model"), 0.02),
        out=ParamSpec((R, D, mixed), ("layer", "model", "heads"), _out_std(cfg)),
        ffn_norm=norm,
        ffn=None,
        moe=None,
        latent=_latent(cfg, latent, R) if latent else None,
        indexer=_indexer(cfg, cfg.indexer, R) if cfg.indexer else None,
        qkv_bias=ParamSpec((R, (N + K) * H + values), ("layer", "heads"), BIAS_STD) if cfg.qkv_bias else None,
        out_bias=ParamSpec((R, D), ("layer", "model"), BIAS_STD) if cfg.out_bias else None,
        query_norm=query_norm,
        key_norm=key_norm,
        sinks=ParamSpec((R, N), ("layer", "heads"), BIAS_STD) if cfg.sinks else None,
        attention_norm_bias=norm_bias,
        ffn_norm_bias=norm_bias,
        attention_gate=ParamSpec((R, gates, D), ("layer", "heads", "model"), 0.02) if cfg.attention_gate else None,
        attention_post_norm=norm if cfg.post_norms else None,
        ffn_post_norm=norm if cfg.post_norms else None,
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


def _indexer(cfg: ModelConfig, indexer: IndexerConfig, R: int) -> IndexerWeights:
    assert cfg.latent is not None
    D, N, H = cfg.d_model, indexer.heads, indexer.d_key
    return IndexerWeights(
        query=ParamSpec((R, N * H, cfg.latent.d_query), ("layer", "heads", "latent"), 0.02),
        key=ParamSpec((R, H, D), ("layer", "head", "model"), 0.02),
        norm=ParamSpec((R, H), ("layer", "head"), 0),
        norm_bias=ParamSpec((R, H), ("layer", "head"), BIAS_STD),
        weigh=ParamSpec((R, N, D), ("layer", "rate", "model"), 0.02),
    )


def _moe(cfg: ModelConfig, kind: LayerKind, R: int) -> MoE:
    moe, routed = cfg.experts_of(kind), kind == "moe"
    D, E, C = cfg.d_model, moe.experts, moe.d_latent
    shared = feed_forward_specs(cfg, (R,), ("layer",), moe.d_shared, moe.activation) if moe.d_shared else None
    own_norm = ParamSpec((R, D), ("layer", "model"), 0) if moe.own_norms else None
    return MoE(
        router=ParamSpec((R, E, D), ("layer", "router", "model"), 0.02) if routed else None,
        bias=ParamSpec((R, E), ("layer", "router"), BIAS_STD) if routed else None,
        shared=shared,
        experts=expert_feed_forward_specs(cfg, moe, (R, E), ("layer", "expert")),
        shared_gate=ParamSpec((R, 1, D), ("layer", "router", "model"), 0.02) if moe.shared_gate else None,
        latent_in=ParamSpec((R, C, D), ("layer", "latent", "model"), 0.02) if C else None,
        latent_out=ParamSpec((R, D, C), ("layer", "model", "latent"), _out_std(cfg)) if C else None,
        router_norm=own_norm,
        shared_norm=own_norm,
        shared_post_norm=own_norm,
        post_norm=own_norm,
        expert_scale=ParamSpec((R, E), ("layer", "router"), 0) if moe.expert_scales else None,
    )


def expert_feed_forward_specs(
    cfg: ModelConfig, moe: MoEConfig, lead: tuple[int, ...], names: tuple[str, ...]
) -> FeedForward:
    """The ParamSpecs of routed experts, after the axes `lead`."""
    size, biased = moe.d_latent or None, moe.expert_bias
    return feed_forward_specs(cfg, lead, names, moe.d_expert, moe.activation, size=size, biased=biased)


def feed_forward_specs(
    cfg: ModelConfig,
    lead: tuple[int, ...],
    names: tuple[str, ...],
    width: int,
    activation: Activation,
    *,
    size: int | None = None,
    biased: bool = False,
) -> FeedForward:
    """The ParamSpecs of a feed-forward part of this width, after the axes `lead`. It takes and gives `size` numbers
    (those of the model by default)."""
    D, above = size or cfg.d_model, 2 * width if is_gated(activation) else width
    return FeedForward(
        gate_up=ParamSpec((*lead, above, D), (*names, "ffn", "model"), 0.02),
        down=ParamSpec((*lead, D, width), (*names, "model", "ffn"), _out_std(cfg)),
        gate_up_bias=ParamSpec((*lead, above), (*names, "ffn"), BIAS_STD) if biased else None,
        down_bias=ParamSpec((*lead, D), (*names, "model"), BIAS_STD) if biased else None,
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


def expert_positions(cfg: ModelConfig) -> list[Position]:
    """The positions of all layers with experts in slots."""
    return [(i, j) for i, (pattern, _) in enumerate(cfg.segments) for j, kind in enumerate(pattern) if in_slots(kind)]


def expert_specs(cfg: ModelConfig, position: Position) -> FeedForward:
    """The ParamSpecs `[R, E, ...]` of the experts at a position."""
    i, j = position
    moe = param_specs(cfg).segments[i][j].moe
    assert moe is not None, f"the layers at {position} have no experts"
    return moe.experts


def map_layers(params: Params, change: Callable[[Position, Layer], Layer]) -> Params:
    """Params with every stacked layer changed."""
    segments = enumerate(params.segments)
    return dataclasses.replace(
        params, segments=tuple(tuple(change((i, j), each) for j, each in enumerate(segment)) for i, segment in segments)
    )


def replace_experts(params: Params, change: Callable[[Position, FeedForward], Any]) -> Params:
    """Params with other experts at every position that has some."""

    def layer(position: Position, each: Layer) -> Layer:
        if each.moe is None:
            return each
        moe = dataclasses.replace(each.moe, experts=change(position, each.moe.experts))
        return dataclasses.replace(each, moe=moe)

    return map_layers(params, layer)


def map_experts(params: Params, change: Callable[[Any], Any]) -> Params:
    """Params with every leaf of experts changed."""
    return replace_experts(params, lambda _, experts: jax.tree.map(change, experts))


def tensor_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Every tensor of a model by name."""
    return named_tensors(param_specs(cfg))


def named_tensors(tree: Any) -> dict[str, Any]:
    """The leaves of a `Params` tree (arrays or ParamSpecs), by tensor name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def is_expert(name: str) -> bool:
    """True for the tensors of routed experts, whose first two axes are repeat and expert."""
    return ".moe.experts." in name
