"""Kimi-Linear (Moonshot AI, arXiv 2510.26692) and Ling 3 (Ant Group): Kimi delta attention on most layers, DeepSeek's
latent attention on the others, DeepSeek-V3's routing."""

from __future__ import annotations

from typing import Any

from planner.inputs.layer_states import KimiDelta
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import layers_of_kind, read_dense_layers
from planner.inputs.published.deepseek import read_latent_decoder, read_sigmoid_experts

FULL, LINEAR = "full_attention", "linear_attention"
SPELT = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}
"""Other names that these families have for fields."""


def read_kimi_linear(f: ConfigFields) -> dict[str, Any]:
    """Kimi-Linear. Its latent attention has no rotary embedding."""
    f = _respelt(f)
    experts = read_sigmoid_experts(f, width=1024, experts=256, scale=2.446)
    plain = read_latent_decoder(f, experts, context=1_048_576, stop=(163_586,), norm_eps=1e-5, d_query=0)
    inner = f.nested("linear_attn_config") or ConfigFields({}, f.where)
    size = inner.integer("head_dim", f.integer("linear_head_dim", 128))
    delta = KimiDelta(
        heads=inner.integer("num_heads", f.integer("linear_num_heads", 32)),
        d_head=size,
        kernel=inner.integer("short_conv_kernel_size", f.integer("linear_conv_kernel_dim", 4, least=2), least=2),
        d_low=size,
    )
    states = _state_layers(f, inner, plain["layers"])
    unrotated = {"unrotated_layers": tuple(range(plain["layers"]))}
    return plain | unrotated | read_dense_layers(f, 1) | _with_states(f, states, delta, plain["layers"])


def read_bailing_hybrid(f: ConfigFields) -> dict[str, Any]:
    """Ling 3: the gate of its latent attention is one number for each head, and decays have a bound. Ling 2.5 and 2.6
    have the same `model_type`, and lightning attention in place of Kimi delta attention."""
    f = _respelt(f)
    if any("V2_5" in each for each in f.listed("architectures", str, ())) or f.text("linear_attention", "kda") != "kda":
        raise f.error(
            f"architectures are {f.values.get('architectures')}, whose lightning attention is not supported; Ling 3 "
            "(BailingMoeV3ForCausalLM) is"
        )
    experts = read_sigmoid_experts(f, width=768, experts=512, groups=8, used=4, scale=2.5)
    if not f.has("rope_parameters"):
        f = ConfigFields({"rope_theta": 6_000_000.0, **f.values}, f.where)
    plain = read_latent_decoder(f, experts, context=262_144, stop=(156_895,), d_query=0)
    layers, every = plain["layers"], f.integer("layer_group_size", 6)
    states = tuple(i for i in range(layers) if (i + 1) % every)
    if f.has("layer_types"):
        states = layers_of_kind(f, "layer_types", LINEAR, FULL)
    delta = KimiDelta(
        heads=plain["heads"],
        d_head=f.integer("linear_head_dim", f.integer("head_dim", 128)),
        kernel=f.integer("short_conv_kernel_size", 4, least=2),
        least_log=f.number("kda_lower_bound", -5.0) if f.flag("kda_safe_gate", True) else None,
    )
    gate = {"attention_gate": True, "gate_by_head": True}
    return plain | gate | read_dense_layers(f, 2) | _with_states(f, states, delta, layers)


def _respelt(f: ConfigFields) -> ConfigFields:
    """The fields under their usual names."""
    found = {usual: f.values[name] for usual, name in SPELT.items() if name in f.values}
    for usual, value in found.items():
        if f.has(usual) and f.values[usual] != value:
            raise f.error(f"{usual} is {f.values[usual]!r}, but {SPELT[usual]} is {value!r}")
    return ConfigFields({**f.values, **found}, f.where)


def _state_layers(f: ConfigFields, inner: ConfigFields, layers: int) -> tuple[int, ...]:
    if f.has("layer_types"):
        return layers_of_kind(f, "layer_types", LINEAR, FULL)
    if not (inner.has("kda_layers") and inner.has("full_attn_layers")):
        return tuple(i for i in range(layers) if not i or i % 4)
    delta, full = (inner.listed(key, int) for key in ("kda_layers", "full_attn_layers"))
    if sorted((*delta, *full)) != list(range(1, layers + 1)):
        raise inner.error(
            f"kda_layers and full_attn_layers name {sorted((*delta, *full))}; each of the layers 1 to {layers} must be "
            "in one of them"
        )
    return tuple(sorted(i - 1 for i in delta))


def _with_states(f: ConfigFields, states: tuple[int, ...], delta: KimiDelta, layers: int) -> dict[str, Any]:
    if len(states) == layers:
        raise f.error(f"all {layers} layers are {LINEAR}; at least one must be {FULL}")
    return {"state_layers": states, "kimi_delta": delta if states else None}
