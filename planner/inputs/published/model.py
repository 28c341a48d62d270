"""A published model as a value: sizes, layers and weight form, as its config.json describes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from planner.inputs.latent_attention import LatentAttention
from planner.inputs.layer_states import DeltaNet, KimiDelta, Mamba2, ShortConvolution, StateMixer
from planner.inputs.published.weight_form import WeightForm
from planner.inputs.routed_experts import Activation, RoutedExperts
from planner.inputs.score_growth import PublishedScoreGrowth
from planner.inputs.sparse_attention import Indexer
from planner.inputs.windowed_attention import WindowedHeads


@dataclass(frozen=True, kw_only=True)
class PublishedRope:
    """Rotary position embedding: base `theta`, `size` rotated numbers of each head, and how frequencies are scaled.

    `kind` is the `rope_type`: `default`, `linear`, `llama3`, `yarn`, `longrope`, `proportional`, or one that is not
    read further.
    `magnitude` multiplies rotated vectors (`long_magnitude`: beyond `original_context`, where LongRoPE divides
    frequencies by `long_factors` instead of `short_factors`). With `proportional` only the first `pairs` pairs of
    numbers are rotated (Gemma 4).
    """

    theta: float
    size: int
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    long_magnitude: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class PublishedWindowed(WindowedHeads):
    """The attention of layers with a window, where it is not that of the other layers."""

    rope: PublishedRope


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A decoder of attention and SwiGLU layers, some of them with routed experts. The defaults are Llama's.

    `expert_limits` and `dense_limits` bound the inner activations of experts, and of shared experts and dense layers
    (RoutedExperts), of each layer, 0 for none.

    With `experts`, layers `sparse_step - 1`, `2 * sparse_step - 1`, ... are routed, except `dense_layers`; the others
    are dense, of width `dense_width`. `windows` has the positions that each layer sees at most (None: all); if
    `chunked`, a layer sees its chunk of that many positions instead of the last ones. With `windowed`, layers with a
    window have heads and a rotary embedding of their own. Values have `value_size` numbers a head (`head_size` by
    default) and are multiplied by `value_scale`; with `value_norm` they are normed by head without weights, and with
    `keys_as_values` those of layers that see everything are the keys before norm and rotation (Gemma 4).

    `unrotated_layers` have no rotary embedding (NoPE, arXiv 2305.19466). `qk_norm` norms queries and keys by `head`,
    over `all` heads, or by `l2` without weights; with `norm_after_rope` after they are rotated. `attention_gate`
    multiplies mixed values by a sigmoid of the layer's input, or as `gate_function` says by a softplus, one for each
    number or with `gate_by_head` for each head; `post_norms` norms what attention and feed-forward add.
    `state_layers` have a gated delta net, a short convolution, Mamba-2 or Kimi delta attention in place of attention.
    `bare_layers` have no feed-forward part, and `activation` is that of the dense ones. An `indexer` chooses the
    positions that latent attention sees. `sinks` gives each head a score that takes weight and adds nothing.
    `score_scale` multiplies attention scores (head_size ** -0.5 by default). With `layer_scales` the output of each
    layer is multiplied by a number of its own. With a `logit_cap` c logits x become c * tanh(x / c). `context` is the
    longest published context in tokens.
    """

    family: str
    vocabulary: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    dense_width: int
    context: int
    value_size: int | None = None
    value_scale: float = 1.0
    value_norm: bool = False
    keys_as_values: bool = False
    rope: PublishedRope
    form: WeightForm
    stop_tokens: tuple[int, ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    tied_head: bool = False
    head_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "all", "l2"] = "none"
    norm_after_rope: bool = False
    unrotated_layers: tuple[int, ...] = ()
    score_growth: PublishedScoreGrowth | None = None
    attention_gate: bool = False
    gate_by_head: bool = False
    gate_function: Literal["sigmoid", "softplus"] = "sigmoid"
    post_norms: bool = False
    clip_qkv: float | None = None
    sinks: bool = False
    windows: tuple[int | None, ...] = ()
    chunked: bool = False
    windowed: PublishedWindowed | None = None
    score_scale: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    layer_scales: bool = False
    latent: LatentAttention | None = None
    indexer: Indexer | None = None
    delta_net: DeltaNet | None = None
    short_convolution: ShortConvolution | None = None
    mamba: Mamba2 | None = None
    kimi_delta: KimiDelta | None = None
    state_layers: tuple[int, ...] = ()
    experts: RoutedExperts | None = None
    sparse_step: int = 1
    expert_limits: tuple[float, ...] = ()
    dense_limits: tuple[float, ...] = ()
    dense_layers: tuple[int, ...] = ()
    bare_layers: tuple[int, ...] = ()
    activation: Activation = "swiglu"

    @cached_property
    def routed_layers(self) -> tuple[int, ...]:
        """The layers with routed experts, ascending."""
        if self.experts is None:
            return ()
        last = self.sparse_step - 1
        others = {*self.dense_layers, *self.bare_layers}
        return tuple(i for i in range(self.layers) if i % self.sparse_step == last and i not in others)

    @property
    def window(self) -> int | None:
        """The positions that windowed layers see at most; None in a model without windows."""
        return max((w for w in self.windows if w is not None), default=None)

    @property
    def attention_layers(self) -> int:
        """Number of layers that cache keys and values."""
        return self.layers - len(self.state_layers)

    @property
    def state_elements(self) -> int:
        """Numbers of a request's state, over all layers that have one."""
        mixer = self.state_mixer
        return len(self.state_layers) * mixer.state_elements(self.hidden_size) if mixer else 0

    @property
    def state_mixer(self) -> StateMixer | None:
        """The part of `state_layers` in place of attention; None in a model without them."""
        return self.delta_net or self.short_convolution or self.mamba or self.kimi_delta

    @property
    def kinds_of_attention(self) -> tuple[tuple[PublishedModel, int], ...]:
        """The kinds of layers with attention, each as a model all of whose layers are of that kind, and how many layers
        there are of it: first the layers that see everything, with `windowed` then the layers with a window."""
        if self.windowed is None:
            return ((self, self.attention_layers),)
        own, count = self.windowed, sum(window is not None for window in self.windows)
        heads = {"heads": own.n_heads, "kv_heads": own.n_kv_heads, "head_size": own.d_head, "value_size": own.d_value}
        windowed = replace(self, windowed=None, sinks=own.sinks, rope=own.rope, keys_as_values=False, **heads)
        return (replace(self, windowed=None), self.layers - count), (windowed, count)

    @property
    def value_numbers(self) -> int:
        """Numbers of a head's value where attention is not latent."""
        return self.head_size if self.value_size is None else self.value_size

    @property
    def cache_elements_per_layer(self) -> int:
        """Numbers that one layer caches per position; with `windowed` the larger number of the two kinds, as `moejax
        serve` has rows of one width."""
        if self.latent is not None:
            indexed = self.indexer.d_key if self.indexer else 0
            return self.latent.d_latent + self.latent.d_rope + indexed
        kinds = [kind for kind, _ in self.kinds_of_attention]
        keys = max(kind.kv_heads * kind.head_size for kind in kinds)
        return keys + max(kind.kv_heads * kind.value_numbers for kind in kinds)

    @property
    def cache_parts_per_layer(self) -> int:
        """Parts of what one layer caches per position that have a scale each, in formats with scales: the key and the
        value of each head; a latent, its rotated key, and the key of an indexer."""
        if self.latent is not None:
            return 2 + (self.indexer is not None)
        kinds = [kind for kind, _ in self.kinds_of_attention]
        keys = max(kinds, key=lambda kind: kind.kv_heads * kind.head_size)
        return keys.kv_heads + max(kinds, key=lambda kind: kind.kv_heads * kind.value_numbers).kv_heads
