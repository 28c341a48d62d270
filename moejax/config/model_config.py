"""The configuration of a model: frozen, validated, and without anything about where the model runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args

from moejax.config.attention_config import (
    DeltaNetConfig,
    IndexerConfig,
    KimiDeltaConfig,
    LatentConfig,
    Mamba2Config,
    RopeScaling,
    ScoreGrowth,
    ShortConvolutionConfig,
    WindowedConfig,
)
from moejax.config.config_values import ConfigError, build_config
from moejax.config.layer_segments import (
    Kinds,
    LayerKind,
    Segments,
    in_slots,
    segments_of_kinds,
    segments_of_one_pattern,
    segments_of_patterns,
)
from moejax.config.model_json import read_values, written_values
from moejax.config.moe_config import MoEConfig
from moejax.config.packed_form import GROUP, PackedForm
from planner.inputs.layer_states import StateMixer
from planner.inputs.routed_experts import Activation

WeightFormat = Literal[
    "float32", "bfloat16", "int8", "int4", "published-int4", "mxfp4", "nvfp4", "fp8", "published-int8"
]
"""Of matrices; in the last five a rank holds what is published in them as it is (`packed`), the rest in bfloat16."""
PACKED_FORMATS = ("published-int4", "mxfp4", "nvfp4", "fp8", "published-int8")
CacheFormat = Literal["float32", "bfloat16", "int8", "fp8"]
"""Of keys and values in the cache (`moejax.config.kv_cache`); int8 and fp8 with a scale for each head."""
STATE_MIXERS = ("delta_net", "short_convolution", "mamba", "kimi_delta")
"""Fields with the part of layers whose context is a state, of which a model has one at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of attention and feed-forward layers, some with routed experts. The defaults are Llama's.

    `family` names the checkpoints that its parameters come from (`moejax.checkpoint.families`); `weights` is the weight
    format (`moejax.config.weight_formats`), with `packed` where ranks hold matrices as they are published,
    `cache_format` that of keys and values in the cache (`moejax.config.kv_cache`); all are chosen when a model is
    served.

    `expert_limits` and `dense_limits` are those of MoEConfig for each layer, 0 for none.

    `moe_every = m` makes layers m-1, 2m-1, ... Mixture-of-Experts layers and leaves the others dense;
    `moe_every = 1` makes all of them so, except `dense_layers`; a model without `moe` is dense. `bare_layers` have no
    feed-forward part, and `activation` is that of the dense ones. With `shard_dense` the dense layers of a model with
    experts are cut into as many shards as there are experts, and ranks hold those in slots as they hold experts; every
    token uses all of them. It is chosen when a model is served (`moejax.checkpoint.shard_dense`).

    `rope_dims` of each head are rotated (all by default). Layers see the last `window` positions only, or with
    `chunked` their chunk of so many positions (Llama 4), except `full_layers`; `unrotated_layers` have no rotary
    embedding. With `windowed`, layers with a window have heads and a rotary embedding of their own. Values have
    `d_value` numbers a head (`d_head` by default) and are multiplied by `value_scale`; with `value_norm` they are
    normed by head without weights, and with `keys_as_values` those of layers that see everything are the keys before
    norm and rotation (Gemma 4). Scores grow as `score_growth` says. `qk_norm` norms queries and keys by `head` (Qwen3)
    or `all` heads at once (OLMoE), with `norm_after_rope` after they are rotated (Hunyuan), or by `l2`, without weights
    and only where they are rotated (Llama 4).

    `attention_gate` multiplies the mixed values of all heads by a sigmoid, or as `gate_function` says by
    a softplus, of the layer's input, one for each number or with `gate_by_head` for each head (Ling 3), and
    `post_norms` norms the outputs of attention and feed-forward before they are added (Trinity has both). `sinks`
    gives each head a score that takes weight and adds nothing (gpt-oss). `clip_qkv` bounds queries, keys and values.
    `attention_scale` multiplies the scores (d_head ** -0.5 by default); the other scales are Granite's. With
    `layer_scales` the output of each layer is multiplied by a number of its own, and with a `logit_cap` c logits x
    become c * tanh(x / c) (Gemma 4).

    With an `indexer`, latent attention sees the positions that it chooses; its keys are cached beside the others.

    `state_layers` have a gated delta net, a short convolution, Mamba-2 or Kimi delta attention in place of attention:
    their context is a state of the request instead of keys and values of its positions
    (`moejax.config.layer_states`).

    With `mtp` one more layer follows, of the kind of the last: it drafts the token after the next (`moejax.model.mtp`),
    is chosen when a model is served, and `n_layers` does not count it.

    With `tensor` > 1 this is one tp shard of a model (`tp_shard`): heads are those of one rank of a tensor group.
    """

    name: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    d_value: int | None = None
    value_scale: float = 1.0
    value_norm: bool = False
    keys_as_values: bool = False
    family: str = "moejax"
    weights: WeightFormat = "float32"
    packed: PackedForm | None = None
    cache_format: CacheFormat = "float32"
    rope_base: float = 10_000.0
    rope_dims: int | None = None
    rope_scaling: RopeScaling | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    tied_head: bool = True
    head_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "all", "l2"] = "none"
    norm_after_rope: bool = False
    attention_gate: bool = False
    gate_by_head: bool = False
    gate_function: Literal["sigmoid", "softplus"] = "sigmoid"
    post_norms: bool = False
    clip_qkv: float | None = None
    sinks: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    chunked: bool = False
    windowed: WindowedConfig | None = None
    unrotated_layers: tuple[int, ...] = ()
    score_growth: ScoreGrowth | None = None
    attention_scale: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    layer_scales: bool = False
    max_context: int = 2048
    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()
    latent: LatentConfig | None = None
    indexer: IndexerConfig | None = None
    delta_net: DeltaNetConfig | None = None
    short_convolution: ShortConvolutionConfig | None = None
    mamba: Mamba2Config | None = None
    kimi_delta: KimiDeltaConfig | None = None
    state_layers: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    moe_every: int = 1
    expert_limits: tuple[float, ...] = ()
    dense_limits: tuple[float, ...] = ()
    dense_layers: tuple[int, ...] = ()
    bare_layers: tuple[int, ...] = ()
    activation: Activation = "swiglu"
    shard_dense: bool = False
    mtp: bool = False
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.weights not in get_args(WeightFormat):
            raise ConfigError(f"weights is {self.weights!r}; known are {', '.join(map(repr, get_args(WeightFormat)))}.")
        if (self.packed is None) == (self.weights in PACKED_FORMATS):
            raise ConfigError(f"weights is {self.weights} with packed {self.packed}; the forms as published need both.")
        if self.cache_format not in get_args(CacheFormat):
            known = ", ".join(map(repr, get_args(CacheFormat)))
            raise ConfigError(f"cache_format is {self.cache_format!r}; known are {known}.")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly. "
                "n_heads must be a multiple of n_kv_heads."
            )
        if self.moe is not None and not 1 <= self.moe_every <= self.n_layers:
            raise ConfigError(
                f"moe_every is {self.moe_every} in a model of {self.n_layers} layers. "
                f"Choose between 1 and {self.n_layers}."
            )
        for field in ("dense_layers", "bare_layers", "full_layers", "unrotated_layers", "state_layers"):
            if beyond := [i for i in getattr(self, field) if not 0 <= i < self.n_layers]:
                raise ConfigError(f"{field} names layer {beyond[0]} in a model of {self.n_layers} layers (0 is first).")
        if self.moe is not None and "moe" not in self._main_kinds:
            raise ConfigError(
                f"{self.name} has experts, but none of its {self.n_layers} layers is routed: moe_every is "
                f"{self.moe_every}, dense_layers are {list(self.dense_layers)}. Leave a layer routed, or leave out moe."
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window is {self.window}; a layer sees at least 1 position. Leave it out to see all.")
        if self.rotated % 2 or not 2 <= self.rotated <= self.d_head:
            raise ConfigError(f"rope_dims is {self.rotated} with d_head {self.d_head}; it must be even and no larger.")
        if self.rope_scaling and self.rope_scaling.factors and len(self.rope_scaling.factors) != self.rotated // 2:
            raise ConfigError(
                f"rope_scaling has {len(self.rope_scaling.factors)} factors, but {self.rotated} rotated dimensions "
                f"need {self.rotated // 2}."
            )
        if self.norm_after_rope and self.qk_norm != "head":
            raise ConfigError(f"norm_after_rope is true with qk_norm {self.qk_norm!r}; it needs norms by head.")
        if self.head_bias and self.tied_head:
            raise ConfigError("head_bias is true with tied_head: only a head of its own can have a bias.")
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.indexer is not None:
            self._check_indexer(self.indexer)
        if self.state_mixer or self.state_layers:
            self._check_state_layers()
        for field in ("expert_limits", "dense_limits"):
            limits = getattr(self, field)
            if limits and (self.moe is None or self.mtp or len(limits) != self.n_layers or min(limits) < 0):
                raise ConfigError(
                    f"{field} is {list(limits)} in a model of {self.n_layers} layers; it has a number of at least 0 "
                    "for each layer of a model with experts and without mtp."
                )
        if self.windowed is not None:
            self._check_windowed()
        if self.keys_as_values:
            self._check_keys_as_values()
        if self.mtp and self.cache_format != "float32":
            raise ConfigError(
                f"cache_format is {self.cache_format} with mtp: a layer of multi-token prediction keeps float32 only "
                "yet. Serve it with --kv-cache-type float32, or with --speculate ngram."
            )
        if self.mtp and (self.state_layers or self.norm != "rms"):
            raise ConfigError(
                f"mtp is true, but {self.name} has state_layers {list(self.state_layers)} and norm {self.norm!r}; a "
                "layer of multi-token prediction needs attention in all layers and norm 'rms'."
            )
        if self.shard_dense:
            self._check_sharded_dense()

    def _check_windowed(self) -> None:
        sees_all = [i for i, window in enumerate(self.windows) if window is None]
        if self.window is None or self.chunked or not 0 < len(sees_all) < self.n_layers:
            raise ConfigError(
                f"windowed is given, but window is {self.window}, chunked is {self.chunked}, and {len(sees_all)} of "
                f"{self.n_layers} layers see everything; it needs layers with a window and layers without."
            )
        if self.latent is not None or self.state_layers or self.mtp:
            raise ConfigError("windowed is given with latent attention, states or mtp, beside which it is not served.")
        for index in range(self.n_layers):
            self.of_layer(index)

    def _check_keys_as_values(self) -> None:
        if self.value_size != self.d_head or self.qkv_bias or (self.window is not None and self.windowed is None):
            raise ConfigError(
                f"keys_as_values is true with d_value {self.value_size}, d_head {self.d_head}, "
                f"qkv_bias {self.qkv_bias}, window {self.window} and windowed {self.windowed}: values are of the size "
                "of keys then, projections have no biases, and layers with a window have attention of their own."
            )

    def _check_indexer(self, indexer: IndexerConfig) -> None:
        if self.latent is None or not self.latent.d_query:
            raise ConfigError("indexer needs latent attention whose queries go through a latent (d_query above 0).")
        if indexer.d_key < self.latent.d_rope:
            raise ConfigError(
                f"indexer has d_key {indexer.d_key}, but {self.latent.d_rope} numbers of its keys are rotated (d_rope)."
            )

    def _check_state_layers(self) -> None:
        given = {kind: getattr(self, kind) for kind in STATE_MIXERS if getattr(self, kind) is not None}
        if len(given) != 1 or not self.state_layers:
            raise ConfigError(
                f"state_layers are {list(self.state_layers)} with {given or 'nothing that has a state'}; give layers "
                f"and one of {', '.join(STATE_MIXERS)}, or nothing of these."
            )
        if len(set(self.state_layers)) == self.n_layers:
            raise ConfigError(f"all {self.n_layers} layers of {self.name} are state_layers; one must have attention.")

    def _check_sharded_dense(self) -> None:
        if self.moe is None or "sharded" not in self.layer_kinds:
            raise ConfigError(f"shard_dense is true, but {self.name} has no dense layers beside layers with experts.")
        if self.activation != "swiglu":
            raise ConfigError(
                f"shard_dense is true, but the dense layers of {self.name} have activation {self.activation!r}; only "
                "'swiglu' is sharded. Serve it with replicated dense layers."
            )
        if self.d_ff % self.moe.experts:
            raise ConfigError(
                f"dense layers of width {self.d_ff} cannot be cut into {self.moe.experts} equal shards, one for each "
                f"expert of {self.name}. Serve it with replicated dense layers."
            )
        if self.weights == "int4":
            _check_groups(self, self.d_ff // self.moe.experts, f"shards of dense layers ({self.moe.experts})")

    def _check_latent(self, latent: LatentConfig) -> None:
        if self.d_head != latent.d_plain + latent.d_rope:
            raise ConfigError(
                f"d_head is {self.d_head}, but latent heads have {latent.d_plain} + {latent.d_rope} numbers."
            )
        if self.n_kv_heads != self.n_heads:
            raise ConfigError(f"{self.n_kv_heads} key/value heads with latent attention; it has one per query head.")
        for field, off in (
            ("d_value", None),
            ("value_scale", 1.0),
            ("value_norm", False),
            ("keys_as_values", False),
            ("qk_norm", "none"),
            ("qkv_bias", False),
            ("out_bias", False),
            ("clip_qkv", None),
        ):
            if getattr(self, field) != off:
                raise ConfigError(f"{field} is {getattr(self, field)!r}; latent attention knows {off!r} only.")
        if self.attention_gate and not self.gate_by_head:
            raise ConfigError("gate_by_head is False with attention_gate; latent attention has gates by head only.")
        rotated = [i for i in range(self.n_layers) if i not in (*self.unrotated_layers, *self.state_layers)]
        if self.unrotated_layers and rotated:
            raise ConfigError(
                f"layer {rotated[0]} is rotated and layer {self.unrotated_layers[0]} is not; of layers with latent "
                "attention all are rotated, or none."
            )

    def with_packed(self, form: PackedForm | None) -> "ModelConfig":
        """The model with these parts as they are published, and bfloat16 where there are none."""
        if form is None:
            return dataclasses.replace(self, weights="bfloat16", packed=None)
        by_scale = {"e8m0": "mxfp4", "e4m3": "nvfp4"}.get(form.scale, "published-int4")
        name = {"fp8": "fp8", "int8": "published-int8"}.get(form.numbers, by_scale)
        return dataclasses.replace(self, weights=name, packed=form)

    def tp_shard(self, tensor: int) -> "ModelConfig":
        """The part of the model that one rank computes when its heads are sharded over `tensor` ranks. Raises
        ConfigError for a model whose heads cannot be. Attention is not packed then."""
        if tensor == 1:
            return self
        if self.packed is not None and (rest := self.packed.without("heads")) != self.packed:
            return self.with_packed(rest).tp_shard(tensor)
        if self.latent is not None:
            raise ConfigError(
                f"tensor is {tensor}, but the heads of {self.name} share one latent, which every rank of a group would "
                "hold whole. Serve it with tensor 1."
            )
        if self.mtp:
            raise ConfigError(
                f"tensor is {tensor}, and the layer of {self.name} that drafts tokens (mtp) is not sharded yet. Serve "
                "it with tensor 1, or with --speculate ngram."
            )
        if self.state_layers:
            raise ConfigError(
                f"tensor is {tensor}, but {self.name} has layers whose context is a state, which is not sharded yet. "
                "Serve it with tensor 1."
            )
        if self.qk_norm == "all":
            raise ConfigError(
                f"tensor is {tensor}, but {self.name} norms the queries of all heads at once. Serve it with tensor 1."
            )
        if tensor < 1 or self.n_kv_heads % tensor:
            raise ConfigError(
                f"{self.n_kv_heads} key/value heads of {self.name} cannot be sharded over {tensor} ranks. "
                f"Choose a tensor that divides {self.n_kv_heads}."
            )
        if self.weights == "int4":
            _check_groups(self, self.n_heads // tensor * self.d_head, f"shards of attention (tensor {tensor})")
        windowed = None if self.windowed is None else self._windowed_shard(self.windowed, tensor)
        n_heads, n_kv_heads = self.n_heads // tensor, self.n_kv_heads // tensor
        return dataclasses.replace(self, n_heads=n_heads, n_kv_heads=n_kv_heads, windowed=windowed, tensor=tensor)

    def _windowed_shard(self, windowed: WindowedConfig, tensor: int) -> WindowedConfig:
        if windowed.n_kv_heads % tensor:
            raise ConfigError(
                f"{windowed.n_kv_heads} key/value heads of the layers of {self.name} with a window cannot be sharded "
                f"over {tensor} ranks. Choose a tensor that divides {windowed.n_kv_heads} and {self.n_kv_heads}."
            )
        heads, kv_heads = windowed.n_heads // tensor, windowed.n_kv_heads // tensor
        return dataclasses.replace(windowed, n_heads=heads, n_kv_heads=kv_heads)

    def of_layer(self, index: int) -> "ModelConfig":
        """The configuration as layer `index` sees it: that of a model all of whose layers have this one's attention
        (`windowed`) and limits. Fields that name layers are those of the whole model."""
        own: dict[str, Any] = {}
        if self.windowed is not None:
            window = self.windows[index]
            own = {"windowed": None, "window": window, "full_layers": ()}
            own |= {} if window is None else {"keys_as_values": False} | vars(self.windowed)
        if self.expert_limits or self.dense_limits:
            assert self.moe is not None
            routed, dense = (each[index] or None if each else None for each in (self.expert_limits, self.dense_limits))
            own["moe"] = dataclasses.replace(self.moe, expert_limit=routed, dense_limit=dense)
            own |= {"expert_limits": (), "dense_limits": ()}
        return dataclasses.replace(self, **own) if own else self

    @property
    def value_size(self) -> int:
        """Numbers of a head's value where attention is not latent."""
        return self.d_head if self.d_value is None else self.d_value

    @property
    def rotated(self) -> int:
        """Numbers of a head's query and key that are rotated."""
        if self.latent is not None:
            return self.latent.d_rope
        return self.d_head if self.rope_dims is None else self.rope_dims

    @property
    def original_context(self) -> int:
        """The longest context that is served with the factors of short sequences, where a longer one changes them
        (LongRoPE); 0 where it does not."""
        scaling = self.rope_scaling
        changes = scaling is not None and scaling.for_context(self.max_context) != scaling
        return scaling.original_context if scaling is not None and changes else 0

    @property
    def cache_parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers cached per position and layer, of keys and of values, by the parts that share a scale in formats that
        have scales: heads. Latent attention caches the rotated key, followed by that of the indexer, as the one and the
        latent as the other. With `windowed` all layers have rows of the wider kind; those of the other kind end in
        zeros."""
        if self.latent is not None:
            return (self.latent.d_rope, *((self.indexer.d_key,) if self.indexer else ())), (self.latent.d_latent,)
        kinds = (self, self.windowed) if self.windowed else (self,)
        k = max(((kind.d_head,) * kind.n_kv_heads for kind in kinds), key=sum)
        v = max(((kind.value_size,) * kind.n_kv_heads for kind in kinds), key=sum)
        return k, v

    @property
    def cache_widths(self) -> tuple[int, int]:
        """Numbers cached per position and layer, of keys and of values."""
        k, v = self.cache_parts
        return sum(k), sum(v)

    @property
    def depth(self) -> int:
        """Number of layers, with that of multi-token prediction, which is the last of them."""
        return self.n_layers + self.mtp

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have keys and values in the cache, ascending."""
        return tuple(i for i in range(self.depth) if i not in self.state_layers)

    @property
    def state_mixer(self) -> StateMixer | None:
        """The part of `state_layers` in place of attention; None in a model without them."""
        return next((mixer for kind in STATE_MIXERS if (mixer := getattr(self, kind)) is not None), None)

    @property
    def state_elements(self) -> int:
        """Numbers of a request's state, over all layers that have one."""
        mixer = self.state_mixer
        return len(self.state_layers) * mixer.state_elements(self.d_model) if mixer else 0

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The positions that each layer sees, None for all."""
        drafts = (None,) if self.mtp else ()
        return tuple(None if i in self.full_layers else self.window for i in range(self.n_layers)) + drafts

    @property
    def _dense_kind(self) -> LayerKind:
        """The kind of layers without a router."""
        return "sharded" if self.shard_dense else "dense"

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, in order; that of multi-token prediction is the last."""
        drafts: tuple[LayerKind, ...] = ("dense" if self.moe is None else "moe",) if self.mtp else ()
        return self._main_kinds + drafts

    @property
    def _main_kinds(self) -> tuple[LayerKind, ...]:
        plain, last = self._dense_kind, self.moe_every - 1

        def kind(i: int) -> LayerKind:
            if i in self.bare_layers:
                return "bare"
            routed = self.moe is not None and i % self.moe_every == last and i not in self.dense_layers
            return "moe" if routed else plain

        return tuple(kind(i) for i in range(self.n_layers))

    @property
    def segments(self) -> Segments:
        """The main segments; and the layer of multi-token prediction as one of its own, the last."""
        return self.main_segments + (((self.layer_kinds[-1:], 1),) if self.mtp else ())

    @property
    def main_segments(self) -> Segments:
        """The layers as (pattern, repeats), one scan each (`moejax.config.layer_segments`)."""
        kinds = self._main_kinds
        if not (self.state_layers or self.windowed is not None or self.expert_limits or self.dense_limits):
            before: Kinds = (self._dense_kind,) * (self.moe_every - 1)
            return segments_of_kinds(kinds, (*before, "moe"))
        is_windowed = [self.windowed is not None and window is not None for window in self.windows]
        by_layer = [each for each in (self.expert_limits, self.dense_limits) if each]
        limits = [tuple(each[i] for each in by_layer) for i in range(len(kinds))]
        layers = [(kind, i in self.state_layers, is_windowed[i], limits[i]) for i, kind in enumerate(kinds)]
        if self.delta_net is not None:
            return segments_of_one_pattern(kinds, layers)
        return segments_of_patterns(kinds, layers)

    @property
    def n_moe_layers(self) -> int:
        """Layers that have experts in slots: routed layers, and sharded dense layers."""
        return sum(map(in_slots, self.layer_kinds))

    @property
    def sharded_layers(self) -> tuple[int, ...]:
        """The layers with experts in slots, counted by depth, that are sharded dense layers."""
        kinds = [kind for kind in self.layer_kinds if in_slots(kind)]
        return tuple(i for i, kind in enumerate(kinds) if kind == "sharded")

    def experts_of(self, kind: LayerKind) -> MoEConfig:
        """The experts of layers of a kind that has them in slots; for a sharded dense layer its shards, to all of which
        every token goes."""
        assert self.moe is not None
        if kind == "moe":
            return self.moe
        shards = self.moe.experts
        width, limit = self.d_ff // shards, self.moe.dense_limit
        return MoEConfig(experts=shards, experts_per_token=shards, d_expert=width, gate="one", expert_limit=limit)

    def to_json(self) -> str:
        """The configuration as JSON; `from_json` gives it back exactly."""
        return json.dumps(written_values(dataclasses.asdict(self)), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Read what `to_json` wrote. Raises ConfigError on an unknown or missing key."""
        return build_config(cls, read_values(json.loads(text)), "model")

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Read `config.json` of a model folder."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; a model folder holds config.json, tokenizer.json and params/.")
        return cls.from_json(path.read_text())


def _check_groups(cfg: ModelConfig, width: int, shards: str) -> None:
    """Raise ConfigError where the inputs of a shard end within a group of int4."""
    if width % GROUP:
        raise ConfigError(
            f"{shards} of {cfg.name} are {width} inputs wide, which groups of {GROUP} in int4 do not divide. "
            "Serve it with --data-type int8, or without shards."
        )
