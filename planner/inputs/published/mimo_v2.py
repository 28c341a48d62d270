"""MiMo-V2-Flash (Xiaomi, technical report, 2026): windows with sinks and key/value heads of their own on
five of six layers, values smaller than keys, DeepSeek-V3's routing without a shared expert."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_windows
from planner.inputs.published.deepseek import read_sigmoid_experts
from planner.inputs.published.model import PublishedRope, PublishedWindowed
from planner.inputs.published.rope import read_rope
from planner.inputs.published.windowed import FULL, WINDOW, rope_of_kind, with_windowed, without_rope

ROTATED = 0.334
"""The part of a head that is rotated, unless a configuration says otherwise."""


def read_mimo_v2_flash(f: ConfigFields) -> dict[str, Any]:
    """MiMo-V2-Flash, as `transformers` writes it or with the fields of Xiaomi's own class (`hybrid_layer_pattern`,
    `moe_layer_freq`, `swa_...`)."""
    size = f.integer("head_dim", 192)
    value = f.integer("v_head_dim", 128)
    plain = read_decoder(without_rope(f), kv_heads=4, context=131_072, norm_eps=1e-5, head_size=size)
    layers, heads, kv_heads = plain["layers"], plain["heads"], plain["kv_heads"]
    own_size = f.integer("swa_head_dim", size)
    windowed = PublishedWindowed(
        n_heads=f.integer("swa_num_attention_heads", heads),
        n_kv_heads=f.integer("swa_num_key_value_heads", 2 * kv_heads),
        d_head=own_size,
        d_value=f.integer("swa_v_head_dim", value),
        sinks=f.flag("add_swa_attention_sink_bias", True),
        rope=_rope(f, WINDOW, own_size, f.number("swa_rope_theta", 10_000.0), plain["context"]),
    )
    full = {
        "norm_eps": f.number("rms_norm_eps", f.number("layernorm_epsilon", 1e-5)),
        "value_size": value,
        "value_scale": 1.0 if _is_null(f, "attention_value_scale") else f.number("attention_value_scale", 0.707),
        "qkv_bias": f.flag("attention_bias", False),
        "sinks": f.flag("add_full_attention_sink_bias", False),
        "rope": _rope(f, FULL, size, f.number("rope_theta", 5_000_000.0), plain["context"]),
        "experts": read_sigmoid_experts(f, width=2048, experts=256, shared=0),
        **_dense_layers(f, layers),
    }
    return with_windowed(plain | full, read_windows(f, _window(f), _sliding(f, layers)), windowed)


def _rope(f: ConfigFields, kind: str, size: int, base: float, context: int) -> PublishedRope:
    """The rotary embedding of a kind of layer: `rope_parameters` has one for each, or fields beside it say the base and
    the part that is rotated."""
    if f.has("rope_parameters"):
        return rope_of_kind(f, kind, size, base=base, context=context, partial=ROTATED)
    partial = f.number("partial_rotary_factor", ROTATED)
    return read_rope(without_rope(f), size, partial=partial, base=base, context=context)


def _window(f: ConfigFields) -> int | None:
    """The positions that a layer with a window sees. Xiaomi's `sliding_window_size` counts those before the query."""
    if f.has("sliding_window_size"):
        return f.integer("sliding_window_size") + 1
    return f.integer("sliding_window", 129, null=None)


def _sliding(f: ConfigFields, layers: int) -> tuple[bool, ...]:
    if f.has("hybrid_layer_pattern"):
        return tuple(each == 1 for each in _of_each_layer(f, "hybrid_layer_pattern", layers))
    return tuple(i != 0 and (i + 1) % 6 != 0 for i in range(layers))


def _dense_layers(f: ConfigFields, layers: int) -> dict[str, Any]:
    if f.has("mlp_layer_types") or not f.has("moe_layer_freq"):
        return read_dense_layers(f, 1)
    routed = _of_each_layer(f, "moe_layer_freq", layers)
    return {"dense_layers": tuple(i for i, each in enumerate(routed) if not each)}


def _of_each_layer(f: ConfigFields, key: str, layers: int) -> tuple[int, ...]:
    given = f.listed(key, int)
    if len(given) != layers:
        raise f.error(f"{key} has {len(given)} entries, but num_hidden_layers is {layers}")
    return given


def _is_null(f: ConfigFields, key: str) -> bool:
    return key in f.values and f.values[key] is None
