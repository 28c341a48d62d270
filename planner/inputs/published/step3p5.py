"""Step-3.5-Flash and the decoder of text of Step-3.7-Flash (StepFun, technical report, 2026): windows mixed with full
attention, each kind with its number of heads and its rotary embedding, attention gated by head, DeepSeek-V3's routing,
the inner activations of some layers bounded."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import layers_of_kind, read_decoder, read_experts, read_windows
from planner.inputs.published.model import PublishedRope, PublishedWindowed
from planner.inputs.published.rope import read_rope
from planner.inputs.published.windowed import FULL, WINDOW, rope_of_kind, with_windowed, without_rope

_BY_LAYER = ("layer_types", "mlp_layer_types", "swiglu_limits", "swiglu_limits_shared", "rope_theta")
_BY_LAYER += ("partial_rotary_factors",)


def read_step3p5(f: ConfigFields) -> dict[str, Any]:
    """Step-3.5, as `transformers` writes it or with the fields of StepFun's own class."""
    f = _without_drafts(f)
    size = f.integer("head_dim", 128)
    kv_heads = f.integer("num_key_value_heads", f.integer("num_attention_groups", 8))
    plain = read_decoder(without_rope(f), context=128_000, norm_eps=1e-5, head_size=size, kv_heads=kv_heads)
    layers, heads, biased = plain["layers"], plain["heads"], f.flag("attention_bias", False)
    windows = read_windows(f, f.integer("sliding_window", None), (False,) * layers)
    other = f.nested("attention_other_setting")
    own_heads = heads if other is None else other.integer("num_attention_heads", heads)
    windowed = PublishedWindowed(
        n_heads=f.integer("num_sliding_attention_heads", own_heads, null=own_heads),
        n_kv_heads=plain["kv_heads"],
        d_head=size,
        rope=_rope(f, WINDOW, size, windows, plain["context"]),
    )
    full = {
        "rope": _rope(f, FULL, size, windows, plain["context"]),
        "qk_norm": "head",
        "qkv_bias": biased,
        "out_bias": biased,
        "attention_gate": True,
        "gate_by_head": True,
        "score_scale": f.number("query_pre_attn_scalar", float(size)) ** -0.5,
        "expert_limits": _limits(f, "swiglu_limits", layers),
        "dense_limits": _limits(f, "swiglu_limits_shared", layers),
        "experts": read_experts(
            f,
            per_token=8,
            experts=288,
            width=f.integer("moe_intermediate_size", 1280),
            d_shared=f.integer("share_expert_dim", f.integer("share_expert_dims", 1280)),
            gate="sigmoid",
            normalised=True,
            gate_scale=f.number("moe_router_scaling_factor", 1.0),
            router_bias=True,
        ),
        "dense_layers": _dense_layers(f, layers),
    }
    return with_windowed(plain | full, windows, windowed)


def _without_drafts(f: ConfigFields) -> ConfigFields:
    """The fields without the entries of lists by layer that are those of the layers of multi-token prediction."""
    layers, drafts = f.integer("num_hidden_layers"), f.integer("num_nextn_predict_layers", 0, null=0, least=0)
    own = {key: f.values[key][:layers] for key in _BY_LAYER if _is_list(f, key, layers + drafts)}
    return ConfigFields({**f.values, **own}, f.where)


def _is_list(f: ConfigFields, key: str, length: int) -> bool:
    return isinstance(f.values.get(key), list | tuple) and len(f.values[key]) == length


def _rope(f: ConfigFields, kind: str, size: int, windows: tuple[int | None, ...], context: int) -> PublishedRope:
    """The rotary embedding of a kind of layer: `rope_parameters` has one for each, or lists have its base and the part
    of a head that is rotated by layer, and `rope_scaling` is that of layers that see everything."""
    given = f.nested("rope_parameters")
    if given is not None and (given.has(WINDOW) or given.has(FULL)):
        return rope_of_kind(f, kind, size, base=10_000.0, context=context)
    of_kind = [i for i, window in enumerate(windows) if (window is None) == (kind == FULL)]
    first, layers = of_kind[0] if of_kind else 0, len(windows)
    values = dict(without_rope(f).values) | {"rope_theta": _of_layer(f, "rope_theta", first, layers, 10_000.0)}
    values["partial_rotary_factor"] = _of_layer(f, "partial_rotary_factors", first, layers, 1.0)
    if kind == FULL and f.has("rope_scaling"):
        values["rope_scaling"] = f.values["rope_scaling"]
    return read_rope(ConfigFields(values, f.where), size, partial=1.0, base=10_000.0, context=context)


def _of_layer(f: ConfigFields, key: str, layer: int, layers: int, default: float) -> float:
    """A field that has one number for all layers, or one for each."""
    if not isinstance(f.values.get(key), list | tuple):
        return f.number(key, default)
    return _by_layer(f, key, f.listed(key, float), layers)[layer]


def _limits(f: ConfigFields, key: str, layers: int) -> tuple[float, ...]:
    """The bounds of each layer, 0 for none; empty where no layer has one."""
    given = f.values.get(key) or ()
    numbers = ConfigFields({key: [each or 0.0 for each in given]}, f.where).listed(key, float)
    return _by_layer(f, key, numbers, layers) if any(numbers) else ()


def _by_layer(f: ConfigFields, key: str, given: tuple[float, ...], layers: int) -> tuple[float, ...]:
    if len(given) != layers:
        raise f.error(f"{key} has {len(given)} entries, but num_hidden_layers is {layers}")
    return given


def _dense_layers(f: ConfigFields, layers: int) -> tuple[int, ...]:
    """From `mlp_layer_types`, or `moe_layers_enum`, which names the routed layers: by default the fourth and all after
    it."""
    if f.has("mlp_layer_types"):
        return layers_of_kind(f, "mlp_layer_types", "dense", "sparse")
    named = f.values.get("moe_layers_enum")
    if isinstance(named, str):
        if not all(each.strip().isdecimal() for each in named.split(",") if each.strip()):
            raise f.error(f"moe_layers_enum is {named!r}; it must be a list of layers")
        named = [int(each) for each in named.split(",") if each.strip()]
    routed = (
        range(3, layers)
        if named is None
        else ConfigFields({"moe_layers_enum": named}, f.where).listed("moe_layers_enum", int)
    )
    return tuple(i for i in range(layers) if i not in routed)
