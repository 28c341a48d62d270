"""The fields that nearly all families share with Llama."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.rope import read_rope
from planner.inputs.routed_experts import RoutedExperts


def read_decoder(
    f: ConfigFields,
    *,
    kv_heads: int | None = None,
    context: int,
    stop: tuple[int, ...] = (),
    rope_base: float = 10_000.0,
    norm_eps: float = 1e-6,
    head_size: int | None = None,
    rotated: int | None = None,
    partial: float = 1.0,
    dense_width: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """Fields of PublishedModel: sizes, norm, rotary embedding, context and stop tokens.

    `kv_heads` (None: one per query head), `context`, `stop`, `rope_base`, `norm_eps`, `tied` (the head) and `partial`
    (the part of each head that is rotated) are the defaults of the family's class. `head_size`, `rotated` and
    `dense_width` are given by families that spell them in their own way.
    """
    heads = f.integer("num_attention_heads")
    head_size = head_size or read_head_size(f)
    published = f.integer("max_position_embeddings", context)
    layers = f.integer("num_hidden_layers")
    return {
        "vocabulary": f.integer("vocab_size"),
        "hidden_size": f.integer("hidden_size"),
        "layers": layers,
        "heads": heads,
        "kv_heads": f.integer("num_key_value_heads", kv_heads or heads, null=heads),
        "head_size": head_size,
        "dense_width": dense_width or f.integer("intermediate_size"),
        "context": published,
        "norm_eps": f.number("rms_norm_eps", norm_eps),
        "tied_head": f.flag("tie_word_embeddings", tied),
        "stop_tokens": read_stop_tokens(f, stop),
        "windows": (None,) * layers,
        "rope": read_rope(f, rotated or head_size, partial=partial, base=rope_base, context=published),
    }


def read_head_size(f: ConfigFields, default: int | None = None) -> int:
    """`head_dim`; if absent the `default`, or an even share of the hidden size."""
    if f.has("head_dim"):
        return f.integer("head_dim")
    if default is not None and "head_dim" not in f.values:
        return default
    size, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if size % heads:
        raise f.error(f"hidden_size {size} is no multiple of num_attention_heads {heads}, and head_dim is missing")
    return size // heads


def read_stop_tokens(f: ConfigFields, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """`eos_token_id`, one or several; `default` if it is absent, none if it is null."""
    if "eos_token_id" not in f.values:
        return default
    if isinstance(f.values["eos_token_id"], list):
        return f.listed("eos_token_id", int)
    return (f.integer("eos_token_id", least=0),) if f.has("eos_token_id") else ()


def read_windows(f: ConfigFields, window: int | None, sliding: tuple[bool, ...]) -> tuple[int | None, ...]:
    """`windows` of PublishedModel, from `layer_types` if it is there, else from `sliding`, one for each layer."""
    if f.has("layer_types"):
        named = layers_of_kind(f, "layer_types", "sliding_attention", "full_attention")
        sliding = tuple(i in named for i in range(f.integer("num_hidden_layers")))
    if any(sliding) and window is None:
        raise f.error("layer_types has sliding_attention, but sliding_window is missing")
    return tuple(window if s else None for s in sliding)


def read_dense_layers(f: ConfigFields, default: int = 0, key: str = "first_k_dense_replace") -> dict[str, Any]:
    """`dense_layers` of PublishedModel: the layers that `mlp_layer_types` calls dense; without it the first ones, as
    many as the field `key` says."""
    layers = f.integer("num_hidden_layers")
    if f.has("mlp_layer_types"):
        return {"dense_layers": layers_of_kind(f, "mlp_layer_types", "dense", "sparse")}
    first = f.integer(key, default, null=0, least=0)
    if first > layers:
        raise f.error(f"{key} is {first} in a model of {layers} layers")
    return {"dense_layers": tuple(range(first))}


def layers_of_kind(f: ConfigFields, key: str, kind: str, other: str) -> tuple[int, ...]:
    """The layers that the list `key` says are of a `kind`; the rest must be of the `other`."""
    kinds, layers = f.listed(key, str), f.integer("num_hidden_layers")
    if len(kinds) != layers:
        raise f.error(f"{key} has {len(kinds)} entries, but num_hidden_layers is {layers}")
    if unknown := [each for each in kinds if each not in (kind, other)]:
        raise f.error(f"{key} names {unknown[0]!r}; known are {kind} and {other}")
    return tuple(i for i, each in enumerate(kinds) if each == kind)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")


def read_experts(
    f: ConfigFields, *, per_token: int | None, width: int, experts: int | None = None, **others: Any
) -> RoutedExperts:
    """The routed experts, of this `width`. Their number and that of the chosen ones are spelt in several ways;
    `experts` and `per_token` are the defaults of the family's class, if it has any; `others` are further fields of
    RoutedExperts."""
    count = _spelt(f, EXPERTS, experts)
    chosen = _spelt(f, CHOSEN, per_token)
    if chosen > count:
        raise f.error(f"num_experts_per_tok is {chosen} with {count} experts")
    return RoutedExperts(experts=count, experts_per_token=chosen, d_expert=width, **others)


def _spelt(f: ConfigFields, keys: tuple[str, ...], default: int | None) -> int:
    """The number that a configuration has under one of `keys`, or as a list with the same number for every layer."""
    spelt = {key: _of_every_layer(f, key) for key in keys if f.has(key)}
    if not spelt and default is not None:
        return default
    if not spelt:
        raise f.error(f"{keys[0]} (or {', or '.join(keys[1:])}) is missing")
    if len(set(spelt.values())) > 1:
        raise f.error(" but ".join(f"{key} is {value}" for key, value in spelt.items()))
    return next(iter(spelt.values()))


def _of_every_layer(f: ConfigFields, key: str) -> int:
    if not isinstance(f.values[key], list):
        return f.integer(key)
    given = f.listed(key, int)
    if len(set(given)) != 1 or given[0] < 1:
        raise f.error(f"{key} is {list(given)}; layers that differ in it are not supported")
    return given[0]
