"""Gemma 4 (Google, model card, 2026), the decoder of text: windows with heads and a rotary embedding of their own, a
dense part beside the experts, each between norms of its own, GELU in both, capped logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts, read_windows
from planner.inputs.published.model import PublishedRope, PublishedWindowed
from planner.inputs.published.windowed import FULL, WINDOW, rope_of_kind, with_windowed, without_rope

ROPE = {
    WINDOW: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
"""The rotary embeddings of a configuration that gives none."""
ONLY_SMALL = {
    "hidden_size_per_layer_input": (256, "inputs of each layer by token"),
    "num_kv_shared_layers": (0, "layers that take keys and values from a layer before"),
}
"""Fields of the small dense models whose parts are not read: the default of the class, and what it is."""


def read_gemma4(f: ConfigFields) -> dict[str, Any]:
    """Gemma 4 with experts in every layer, or without any (31B). The dense part beside the experts counts as their
    shared expert."""
    _check(f)
    if not f.has("rope_parameters"):
        f = dataclasses.replace(f, values={**f.values, "rope_parameters": ROPE})
    size = f.integer("head_dim", 256)
    plain = read_decoder(
        without_rope(f), kv_heads=4, context=131_072, stop=(1,), norm_eps=1e-6, head_size=size, tied=True
    )
    windows, kv_heads = _windows(f, plain["layers"]), plain["kv_heads"]
    keys_as_values = f.flag("attention_k_eq_v", False)
    full_size, full_heads = _full_heads(f, windows, size, kv_heads, keys_as_values=keys_as_values)
    windowed = PublishedWindowed(
        n_heads=plain["heads"], n_kv_heads=kv_heads, d_head=size, rope=_rope(f, WINDOW, size, plain["context"])
    )
    full = {
        "head_size": full_size,
        "kv_heads": full_heads,
        "keys_as_values": keys_as_values,
        "value_norm": True,
        "qk_norm": "head",
        "rope": _rope(f, FULL, full_size, plain["context"]),
        "score_scale": 1.0,
        "post_norms": True,
        "layer_scales": True,
        "activation": "geglu",
        "embed_scale": plain["hidden_size"] ** 0.5,
        "logit_cap": f.number("final_logit_softcapping", 0.0) or None,
    }
    if f.flag("enable_moe_block", False):
        full["experts"] = read_experts(
            f,
            per_token=None,
            width=f.integer("moe_intermediate_size"),
            d_shared=plain["dense_width"],
            activation="geglu",
            own_norms=True,
            expert_scales=True,
        )
    return with_windowed(plain | full, windows, windowed)


def _check(f: ConfigFields) -> None:
    """Raise InputError for parts of Gemma 4's other models."""
    for key, (default, about) in ONLY_SMALL.items():
        if given := f.integer(key, default, null=0, least=0):
            raise f.error(
                f"{key} is {given}: {about}, which E2B and E4B have, are not read; 26B-A4B (with experts) and 31B have "
                "0 of them"
            )
    if f.values.get("use_bidirectional_attention") == "all":
        raise f.error("use_bidirectional_attention is 'all': an encoder, whose tokens see those after them")


def _windows(f: ConfigFields, layers: int) -> tuple[int | None, ...]:
    """Five layers with a window before each that sees everything; the last sees everything, as in `transformers`."""
    window = f.integer("sliding_window", 512, null=None)
    return (*read_windows(f, window, tuple((i + 1) % 6 != 0 for i in range(layers)))[:-1], None)


def _full_heads(
    f: ConfigFields, windows: tuple[int | None, ...], size: int, kv_heads: int, *, keys_as_values: bool
) -> tuple[int, int]:
    """Size, and number of key/value heads, of layers that see everything: in the published spelling, or by layer as
    transformers 5 writes them."""
    by_layer = f.nested("per_layer_config")
    if by_layer is None:
        own = f.integer("num_global_key_value_heads", kv_heads, null=kv_heads) if keys_as_values else kv_heads
        return f.integer("global_head_dim", 512), own
    spelt = {int(key): key for key in by_layer.values if key.isdecimal()}  # "05" in a model of ten layers or more
    found = set()
    for i, window in enumerate(windows):
        layer = by_layer.nested(spelt.get(i, "")) or ConfigFields({}, by_layer.where)
        heads = layer.integer("head_dim", size), layer.integer("num_key_value_heads", kv_heads)
        if window is not None and heads != (size, kv_heads):
            raise by_layer.error(f"layer {i} has a window and heads of its own; layers with a window are alike")
        found |= {heads} if window is None else set()
    if len(found) > 1:
        raise by_layer.error(
            f"layers that see everything have {', '.join(f'{n} heads of {d}' for d, n in sorted(found))}; such layers "
            "are alike"
        )
    return next(iter(found))


def _rope(f: ConfigFields, kind: str, size: int, context: int) -> PublishedRope:
    """The rotary embedding of a kind of layer. The plain one turns whole heads, whatever the configuration says."""
    rope = rope_of_kind(f, kind, size, base=10_000.0, context=context)
    return dataclasses.replace(rope, size=size) if rope.kind == "default" else rope
