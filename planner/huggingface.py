"""Hugging Face `config.json` of a model: parameters, cache bytes and flops, by published architecture.

Shapes follow the modelling code of `transformers`, by the rows of `planner.families`; totals are checked against
the published ones in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from planner.errors import InputError, unknown_key, unknown_value
from planner.families import FAMILIES, Config, Family, head_size
from planner.workload import Workload

BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "mxfp4": 4.25 / 8,
    "int4": 0.5,
}

SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    *("intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok", "n_shared_experts"),
    *("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "head_dim"),
    *("first_k_dense_replace", "decoder_sparse_step", "interleave_moe_layer_step", "sliding_window"),
)
MAY_BE_NONE = ("n_shared_experts", "q_lora_rank", "head_dim", "first_k_dense_replace", "sliding_window")
LISTS = ("mlp_only_layers", "layer_types")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters by part. `expert` is one routed expert; the others are summed over all layers."""

    expert: int
    shared: int
    dense: int
    attention: int
    router: int
    norms: int
    embedding: int
    head: int
    moe_layers: int
    experts: int
    experts_per_token: int

    @property
    def rest(self) -> int:
        """Everything but the routed experts."""
        parts = (self.shared, self.dense, self.attention, self.router, self.norms, self.embedding, self.head)
        return sum(parts)

    @property
    def total(self) -> int:
        """All parameters, without multi-token-prediction layers."""
        return self.rest + self.moe_layers * self.experts * self.expert

    @property
    def active(self) -> int:
        """Parameters that one token touches, as model cards count them (embeddings included)."""
        return self.rest + self.moe_layers * self.experts_per_token * self.expert


MODELS = Path(__file__).resolve().parent.parent / "configs" / "models"


def read_model(text: str, *, weights: str | None = None, cache: str = "bfloat16") -> Workload:
    """The model of a preset (`deepseek-v3`), a `config.json`, its folder, or a JSON of Workload fields."""
    name, config = read_source(text)
    return model_in_numbers(name, config, text, weights=weights, cache=cache)


def read_source(text: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of the model that `text` names, as `read_model` takes it."""
    preset = MODELS / f"{text}.json"
    path = preset if preset.is_file() and not Path(text).exists() else Path(text)
    if not path.exists():
        known = sorted(p.stem for p in MODELS.glob("*.json"))
        raise unknown_value(text, known, "neither a file nor one of the models")
    config = read_config(path)
    folder = path if path.is_dir() else path.parent if path.name == "config.json" else None
    return (folder.resolve().name if folder is not None else path.stem), config


def model_in_numbers(
    name: str, config: Config, where: str, *, weights: str | None = None, cache: str = "bfloat16"
) -> Workload:
    """The workload of a published configuration, or of Workload fields; `where` names the file in errors."""
    if "moe_layers" not in config:
        return workload(config, name=name, weights=weights, cache=cache)
    known = [f.name for f in fields(Workload)]
    for key in config:
        if key not in known:
            raise unknown_key(key, known, where)
    return Workload(**{"name": name, **config})


def read_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` at `path` (or in the folder `path`), its text part if it has several."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a {type(config).__name__}, a JSON object is needed")
    return config


def parameters(config: Config) -> Parameters:
    """Parameter counts of the model that `config` describes."""
    c = _text(config)
    family = _family(c)
    d = _int(c, "hidden_size")
    layers, moe = _int(c, "num_hidden_layers"), _by(family.moe_layers, c) if family.routed else 0
    if moe < 0:
        raise InputError(f"config.json: {layers - moe} dense layers come first, of {layers} layers")
    experts, width = (_int(c, family.experts), _int(c, family.expert_width)) if moe else (0, 0)
    shared = _by(family.shared_width, c) if moe else 0
    norms = (2 * layers + 1) * d * (2 if family.norm_bias else 1)
    vocab = _int(c, "vocab_size")
    head = 0 if c.get("tie_word_embeddings") else vocab * d + (vocab if c.get("lm_head_bias") else 0)
    return Parameters(
        expert=3 * d * width + (2 * width + d if moe and family.expert_bias else 0),
        shared=moe * (3 * d * shared + (d if family.shared_gate else 0)),
        dense=(layers - moe) * 3 * d * _int(c, family.dense_width) if moe < layers else 0,
        attention=layers * _attention(c, family),
        router=moe * (d * experts + (experts if family.router_bias else 0)),
        norms=norms,
        embedding=vocab * d,
        head=head,
        moe_layers=moe,
        experts=experts,
        experts_per_token=_int(c, "num_experts_per_tok") if moe else 0,
    )


def _attention(c: Config, family: Family) -> int:
    d, n = _int(c, "hidden_size"), _int(c, "num_attention_heads")
    if "kv_lora_rank" in c:
        rank, rope = _int(c, "kv_lora_rank"), _int(c, "qk_rope_head_dim")
        nope, value = _int(c, "qk_nope_head_dim"), _int(c, "v_head_dim")
        query = n * (nope + rope)
        low = c.get("q_lora_rank")
        queries = d * low + low + low * query if low else d * query
        return queries + d * (rank + rope) + rank + rank * n * (nope + value) + n * value * d
    h, k = head_size(c), _int(c, "num_key_value_heads")
    count = d * n * h * 2 + 2 * d * k * h + family.head_norm(c)
    if family.qkv_bias and c.get("attention_bias", True):
        count += n * h + 2 * k * h
    if family.out_bias:
        count += d
    return count + (n if family.sinks else 0)


def cache_elements(config: Config) -> tuple[int, int]:
    """Cache values per token in layers that see everything, and per request in layers with a window."""
    c = _text(config)
    layers = _int(c, "num_hidden_layers")
    if "kv_lora_rank" in c:
        return layers * _each_layer(c), 0
    each = _each_layer(c)
    windowed = sum(1 for kind in c.get("layer_types") or [] if kind == "sliding_attention")
    return (layers - windowed) * each, windowed * each * int(c.get("sliding_window") or 0)


def whole_cache_elements(config: Config) -> int:
    """Cache values per token when layers with a window keep everything too, as `moejax serve` does."""
    c = _text(config)
    return _int(c, "num_hidden_layers") * _each_layer(c)


def _each_layer(c: Config) -> int:
    if "kv_lora_rank" in c:
        return _int(c, "kv_lora_rank") + _int(c, "qk_rope_head_dim")
    return 2 * _int(c, "num_key_value_heads") * head_size(c)


def workload(config: Config, *, name: str = "model", weights: str | None = None, cache: str = "bfloat16") -> Workload:
    """The model in numbers. `weights` overrides the format of the weights, `cache` is that of the cache (of `BYTES`).

    Flops are two per parameter and token; attention adds, per layer and token of context, two products
    with all heads. With fp8 blocks every 128 x 128 weights carry one float32 scale.
    """
    c = _text(config)
    p = parameters(c)
    if cache not in BYTES:
        raise unknown_key(cache, BYTES, "--cache")
    base, routed = _formats(c, weights)
    scale = 1 + 4 / 128**2 / BYTES["fp8"]
    expert_bytes = p.expert * BYTES[routed] * (scale if routed == "fp8" else 1)
    low = p.embedding + p.head + p.norms + p.router
    dense_format = base if routed != "mxfp4" else "bfloat16"
    rest_bytes = low * max(2.0, BYTES[dense_format]) + (p.rest - low) * BYTES[dense_format]
    per_token, per_request = cache_elements(c)
    heads = c["num_attention_heads"]
    latent = "kv_lora_rank" in c
    products = heads * (2 * c["kv_lora_rank"] + c["qk_rope_head_dim"] if latent else 2 * head_size(c))
    return Workload(
        name=name,
        layers=c["num_hidden_layers"],
        moe_layers=p.moe_layers,
        experts=p.experts,
        experts_per_token=p.experts_per_token,
        expert_bytes=round(expert_bytes),
        rest_bytes=round(rest_bytes),
        dense_bytes=round(p.dense * BYTES[dense_format]),
        attention_bytes=round(p.attention * BYTES[dense_format]),
        cache_bytes_per_token=round(per_token * BYTES[cache]),
        cache_bytes_per_request=round(per_request * BYTES[cache]),
        cache_splits=1 if latent else c["num_key_value_heads"],
        heads=heads,
        hidden_bytes=c["hidden_size"] * 2,
        expert_flops=2.0 * p.expert,
        rest_flops=2.0 * (p.rest - (p.embedding if p.head else 0)),
        context_flops=2.0 * c["num_hidden_layers"] * products,
        weight_format=routed,
        total_parameters=p.total,
        active_parameters=p.active,
    )


def _formats(c: Config, weights: str | None) -> tuple[str, str]:
    """Format of the weights outside the experts and of the routed experts."""
    if weights is not None:
        if weights not in BYTES:
            raise unknown_key(weights, BYTES, "--weights")
        return ("bfloat16" if weights in ("mxfp4", "int4") else weights), weights
    dtype = c.get("torch_dtype") or c.get("dtype") or "bfloat16"
    quantized = c.get("quantization_config") or {}
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    named = dtype if method is None else method
    if not isinstance(named, str) or named not in BYTES:
        what = f"torch_dtype {dtype!r}" if method is None else f"quantization {method!r}"
        raise InputError(f"{what} is not known; pass --weights, one of {', '.join(BYTES)}")
    if method is None:
        return dtype, dtype
    return ("bfloat16" if method == "mxfp4" else method), method


def _text(config: Config) -> Config:
    """The part that describes the decoder, its sizes checked."""
    if isinstance(config.get("text_config"), dict):
        config = {**{k: v for k, v in config.items() if k == "torch_dtype"}, **config["text_config"]}
    for key in SIZES:
        least = 0 if key in MAY_BE_NONE else 1
        value = config.get(key, least)
        absent = value is None and key in MAY_BE_NONE
        if not absent and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise InputError(f"config.json: {key} is {value!r}, it must be a whole number of at least {least}")
    for key in LISTS:
        value = config.get(key)
        if value is not None and not isinstance(value, list):
            raise InputError(f"config.json: {key} is {value!r}, it must be a list")
    return config


def _family(c: Config) -> Family:
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown_key(str(kind), FAMILIES, "config.json (model_type)")
    return FAMILIES[kind]


def _by(rule: Callable[[Config], int], c: Config) -> int:
    """What a rule of the family makes of a configuration; InputError naming the key that it lacks."""
    try:
        return rule(c)
    except KeyError as missing:
        raise InputError(f"config.json of model_type {c.get('model_type')!r} has no {missing}") from None


def _int(c: Config, key: str) -> int:
    if key not in c:
        raise InputError(f"config.json of model_type {c.get('model_type')!r} has no {key!r}")
    value = c[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} is {value!r}, it must be a whole number of at least 1")
    return value
