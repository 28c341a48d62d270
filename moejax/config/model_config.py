"""What a model is, never where it is: frozen, validated, complete before it exists."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args


class ConfigError(ValueError):
    """A model configuration that cannot be: the message names the field, both values and the way out."""


Gate = Literal["softmax", "one", "share", "sigmoid", "sparsemixer"]
Weights = Literal["float32", "bfloat16", "int8"]
LayerKind = Literal["dense", "moe", "divided"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The routed part of a Mixture-of-Experts layer.

    `gate` says how the scores of the k chosen experts become weights:
    `softmax` over the chosen (Mixtral, arXiv 2401.04088), `share` of the softmax over all (OLMoE, arXiv 2409.02060),
    `sigmoid` of each, chosen by sigmoid plus the router's bias (DeepSeek-V3, arXiv 2412.19437), `sparsemixer`
    (Phi-3.5-MoE, arXiv 2409.12136: each choice against those within `jitter` of it), or `one` (each chosen expert
    counts in full: experts that are a split of a dense FFN).

    The weights are divided by their sum if `normalised`, then multiplied by `gate_scale`. With `groups` > 1 only
    experts of the best `groups_used` groups can be chosen; a group counts by its best expert (`share`) or the sum
    of its two best (`sigmoid`).

    `expert_bias` gives experts biases, `swiglu_limit` bounds their SwiGLU as gpt-oss does (`layers.biased_swiglu`);
    `shared_gate` weighs the always-on expert by a sigmoid of its own (Qwen2-MoE).
    """

    experts: int
    experts_per_token: int
    d_expert: int
    d_shared: int = 0
    gate: Gate = "softmax"
    normalised: bool = False
    gate_scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    jitter: float = 0.0
    shared_gate: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token} with {self.experts} experts. "
                f"Choose between 1 and {self.experts}."
            )
        if self.gate not in get_args(Gate):
            raise ConfigError(f"gate is {self.gate!r}; known gates are {', '.join(map(repr, get_args(Gate)))}.")
        if self.shared_gate and not self.d_shared:
            raise ConfigError("shared_gate is true with d_shared 0: there is no shared expert to weigh.")
        if self.swiglu_limit is not None and not self.expert_bias:
            raise ConfigError(f"swiglu_limit is {self.swiglu_limit} without expert_bias; gpt-oss has both.")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.groups == 1:
            return
        if self.gate not in ("share", "sigmoid"):
            raise ConfigError(
                f"groups is {self.groups} with gate {self.gate!r}; only 'share' and 'sigmoid' have groups."
            )
        if self.experts % self.groups or not 1 <= self.groups_used <= self.groups:
            raise ConfigError(
                f"{self.experts} experts in {self.groups} groups of which {self.groups_used} are used: "
                "groups must divide the experts, and groups_used lie between 1 and groups."
            )
        if self.groups_used * (self.experts // self.groups) < self.experts_per_token:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token}, but {self.groups_used} groups of "
                f"{self.experts // self.groups} experts hold fewer."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was first trained on (`moejax.rope`).

    `linear`: divided by `factor`. `llama3` (Llama 3.1): by wavelength against `original_context`, between
    `low_frequency` and `high_frequency`. `yarn` (arXiv 2309.00071): by rotations within `original_context`, between
    `beta_slow` and `beta_fast`. `longrope` (arXiv 2402.13753): each divided by its own of `factors`.
    Rotated vectors are multiplied by `magnitude`.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_context: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn", "longrope"):
            raise ConfigError(f"rope scaling is {self.kind!r}; known are 'linear', 'llama3', 'yarn' and 'longrope'.")
        if self.kind in ("llama3", "yarn") and self.original_context < 1:
            raise ConfigError(f"rope scaling {self.kind!r} needs original_context; it is {self.original_context}.")
        if self.factor <= 0 or any(f <= 0 for f in self.factors):
            raise ConfigError(f"rope scaling factors must be positive: factor {self.factor}, factors {self.factors}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent of `d_latent` and one rotated key of
    `d_rope` per position stand for the keys (`d_plain` unrotated numbers per head) and values (`d_value`) of all
    heads. Queries go through `d_query` numbers, or straight from the model if 0."""

    d_latent: int
    d_rope: int
    d_plain: int
    d_value: int
    d_query: int = 0
    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of attention and SwiGLU layers, some with routed experts. The defaults are Llama's.

    `family` names the checkpoints its parameters come from (`moejax.families`); `weights` is the form in which ranks
    hold matrices (`moejax.precision`), chosen when a model is served.

    `moe_every = m` makes layers m-1, 2m-1, ... Mixture-of-Experts layers and leaves the others dense;
    `moe_every = 1` makes all of them so, except `dense_layers`; a model without `moe` is dense. `divide_dense` has the
    dense layers of a model with experts held as those are: cut into as many shards, in slots, all of them used by every
    token. It is chosen when a model is served (`moejax.divide`).

    `rope_dims` of each head are rotated (all by default). Layers see the last `window` positions only, except
    `full_layers`. `qk_norm` norms queries and keys by `head` (Qwen3) or `all` heads at once (OLMoE). `sinks` gives
    each head a score that takes weight and adds nothing (gpt-oss). `clip_qkv` bounds queries, keys and values.
    `attention_scale` multiplies the scores (d_head ** -0.5 by default); the other scales are Granite's.

    With `tensor` > 1 this is what one rank of a tensor group computes (`share`): heads are counted of the rank.
    """

    name: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    family: str = "moejax"
    weights: Weights = "float32"
    rope_base: float = 10_000.0
    rope_dims: int | None = None
    rope_scaling: RopeScaling | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    tied_head: bool = True
    head_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    clip_qkv: float | None = None
    sinks: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    attention_scale: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    max_context: int = 2048
    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()
    latent: LatentConfig | None = None
    moe: MoEConfig | None = None
    moe_every: int = 1
    dense_layers: tuple[int, ...] = ()
    divide_dense: bool = False
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise ConfigError(f"weights is {self.weights!r}; known are {', '.join(map(repr, get_args(Weights)))}.")
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
        for field in ("dense_layers", "full_layers"):
            if beyond := [i for i in getattr(self, field) if not 0 <= i < self.n_layers]:
                raise ConfigError(f"{field} names layer {beyond[0]} in a model of {self.n_layers} layers (0 is first).")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window is {self.window}; a layer sees at least 1 position. Leave it out to see all.")
        if self.rotated % 2 or not 2 <= self.rotated <= self.d_head:
            raise ConfigError(f"rope_dims is {self.rotated} with d_head {self.d_head}; it must be even and no larger.")
        if self.rope_scaling and self.rope_scaling.factors and len(self.rope_scaling.factors) != self.rotated // 2:
            raise ConfigError(
                f"rope_scaling has {len(self.rope_scaling.factors)} factors, but {self.rotated} rotated dimensions "
                f"need {self.rotated // 2}."
            )
        if self.head_bias and self.tied_head:
            raise ConfigError("head_bias is true with tied_head: only a head of its own can have a bias.")
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.divide_dense:
            self._check_divided()

    def _check_divided(self) -> None:
        if self.moe is None or "divided" not in self.layer_kinds:
            raise ConfigError(f"divide_dense is true, but {self.name} has no dense layers beside layers with experts.")
        if self.d_ff % self.moe.experts:
            raise ConfigError(
                f"dense layers of width {self.d_ff} cannot be divided into {self.moe.experts} shards, one for each "
                f"expert of {self.name}. Serve it with whole dense layers."
            )

    def _check_latent(self, latent: LatentConfig) -> None:
        if self.d_head != latent.d_plain + latent.d_rope:
            raise ConfigError(
                f"d_head is {self.d_head}, but latent heads have {latent.d_plain} + {latent.d_rope} numbers."
            )
        if self.n_kv_heads != self.n_heads:
            raise ConfigError(f"{self.n_kv_heads} key/value heads with latent attention; it has one per query head.")
        for field, off in (("qk_norm", "none"), ("qkv_bias", False), ("out_bias", False), ("clip_qkv", None)):
            if getattr(self, field) != off:
                raise ConfigError(f"{field} is {getattr(self, field)!r}; latent attention knows {off!r} only.")

    def share(self, tensor: int) -> "ModelConfig":
        """What one rank computes of a model whose heads are divided over `tensor` ranks. Raises ConfigError for a model
        of which they cannot be."""
        if tensor == 1:
            return self
        if self.latent is not None:
            raise ConfigError(
                f"tensor is {tensor}, but the heads of {self.name} share one latent, which every rank of a group would "
                "hold whole. Serve it with tensor 1."
            )
        if self.qk_norm == "all":
            raise ConfigError(
                f"tensor is {tensor}, but {self.name} norms the queries of all heads at once. Serve it with tensor 1."
            )
        if tensor < 1 or self.n_kv_heads % tensor:
            raise ConfigError(
                f"{self.n_kv_heads} key/value heads of {self.name} cannot be divided over {tensor} ranks. "
                f"Choose a tensor that divides {self.n_kv_heads}."
            )
        return dataclasses.replace(
            self, n_heads=self.n_heads // tensor, n_kv_heads=self.n_kv_heads // tensor, tensor=tensor
        )

    @property
    def rotated(self) -> int:
        """How many numbers of a head's query and key are rotated."""
        if self.latent is not None:
            return self.latent.d_rope
        return self.d_head if self.rope_dims is None else self.rope_dims

    @property
    def cache_widths(self) -> tuple[int, int]:
        """Numbers kept per position and layer, of keys and of values. Latent attention keeps the rotated key as
        the one and the latent as the other."""
        if self.latent is not None:
            return self.latent.d_rope, self.latent.d_latent
        return self.n_kv_heads * self.d_head, self.n_kv_heads * self.d_head

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions each layer sees, None for all."""
        return tuple(None if i in self.full_layers else self.window for i in range(self.n_layers))

    @property
    def _plain_kind(self) -> LayerKind:
        """The kind of layers without a router."""
        return "divided" if self.divide_dense else "dense"

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, in order."""
        plain = self._plain_kind
        if self.moe is None:
            return (plain,) * self.n_layers
        routed = (i % self.moe_every == self.moe_every - 1 and i not in self.dense_layers for i in range(self.n_layers))
        return tuple("moe" if r else plain for r in routed)

    @property
    def segments(self) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
        """The layers as (pattern, repeats): one scan each. 7 layers, every third routed:
        ((("dense", "dense", "moe"), 2), (("dense",), 1)). 5 layers, the first dense, the others routed:
        ((("dense",), 1), (("moe",), 4))."""
        kinds = self.layer_kinds
        whole: tuple[LayerKind, ...] = (self._plain_kind,) * (self.moe_every - 1) + ("moe",)

        def whole_at(i: int) -> bool:
            return kinds[i : i + len(whole)] == whole

        found, at = [], 0
        while at < len(kinds):
            end = at
            if whole_at(at):
                while whole_at(end):
                    end += len(whole)
                found.append((whole, (end - at) // len(whole)))
            else:
                while end < len(kinds) and kinds[end] == kinds[at] and not whole_at(end):
                    end += 1
                found.append(((kinds[at],), end - at))
            at = end
        return tuple(found)

    @property
    def n_moe_layers(self) -> int:
        """Layers that have experts in slots: routed ones, and dense ones that are divided."""
        return sum(map(in_slots, self.layer_kinds))

    @property
    def divided_layers(self) -> tuple[int, ...]:
        """Which of the layers with experts in slots, counted by depth, are divided dense ones."""
        kinds = [kind for kind in self.layer_kinds if in_slots(kind)]
        return tuple(i for i, kind in enumerate(kinds) if kind == "divided")

    def experts_of(self, kind: LayerKind) -> MoEConfig:
        """The experts of layers of a kind that has them in slots; of a divided layer its shards, all of which every
        token goes to."""
        assert self.moe is not None
        if kind == "moe":
            return self.moe
        shards = self.moe.experts
        return MoEConfig(experts=shards, experts_per_token=shards, d_expert=self.d_ff // shards, gate="one")

    def to_json(self) -> str:
        """The configuration as JSON; `from_json` gives it back exactly."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ConfigError on an unknown or missing key."""
        values = json.loads(text)
        for key, kind in (("moe", MoEConfig), ("latent", LatentConfig), ("rope_scaling", RopeScaling)):
            if values.get(key) is not None:
                values[key] = _build(kind, values[key], key)
        return _build(cls, values, "model")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `config.json` of a model folder."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; a model folder holds config.json, tokenizer.json and params/.")
        return cls.from_json(path.read_text())


def in_slots(kind: LayerKind) -> bool:
    """Whether the weights of a layer's feed-forward part are held in slots."""
    return kind != "dense"


def _build(kind: type, values: Mapping[str, Any], where: str):
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown key {key!r} in the {where} configuration.{hint}")
    missing = [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"the {where} configuration lacks {', '.join(missing)}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
