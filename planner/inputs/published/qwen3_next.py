"""Qwen3-Next (Qwen, 2025) and the decoder of text of Qwen3.5: gated delta nets (arXiv 2412.06464) on three of four
layers, gated attention on the fourth, many small experts."""

from __future__ import annotations

from typing import Any

from planner.inputs.layer_states import DeltaNet
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import layers_of_kind, read_decoder, read_experts, read_head_size
from planner.inputs.routed_experts import RoutedExperts

EVERY = 4
"""Every so many layers one has attention, where neither `layer_types` nor `full_attention_interval` says otherwise."""


def read_qwen3_next(f: ConfigFields) -> dict[str, Any]:
    """Qwen3-Next. Its dense layers, if any, are named by `mlp_only_layers` and `decoder_sparse_step`."""
    gate = "softmax" if f.flag("norm_topk_prob", True) else "share"
    step, dense = f.integer("decoder_sparse_step", 1), f.listed("mlp_only_layers", int, ())
    width = f.integer("intermediate_size", 5632)
    routed = {"experts": _experts(f, gate, per_token=10, experts=512), "sparse_step": step, "dense_layers": dense}
    return _decoder(f, width) | routed


def read_qwen3_5_moe(f: ConfigFields) -> dict[str, Any]:
    """Qwen3.5's decoder of text: every layer is routed, and gates are always divided by their sum. Its positions by
    time, height and width are one and the same for text."""
    experts = _experts(f, "softmax", per_token=8, experts=256)
    return _decoder(f, experts.d_expert) | {"experts": experts}


def read_qwen3_5(f: ConfigFields) -> dict[str, Any]:
    """Qwen3.5's decoder of text without experts."""
    return _decoder(f, f.integer("intermediate_size", 12_288), kv_heads=4)


def _decoder(f: ConfigFields, dense_width: int, kv_heads: int = 2) -> dict[str, Any]:
    plain = read_decoder(
        f, kv_heads=kv_heads, context=32_768, head_size=read_head_size(f, 256), partial=0.25, dense_width=dense_width
    )
    biased, layers = f.flag("attention_bias", False), plain["layers"]
    if f.has("layer_types"):
        states = layers_of_kind(f, "layer_types", "linear_attention", "full_attention")
    else:
        every = f.integer("full_attention_interval", EVERY)
        states = tuple(i for i in range(layers) if (i + 1) % every)
    if len(states) == layers:
        raise f.error(f"all {layers} layers are linear_attention; at least one must be full_attention")
    delta = DeltaNet(
        key_heads=f.integer("linear_num_key_heads", 16),
        value_heads=f.integer("linear_num_value_heads", 32),
        d_key=f.integer("linear_key_head_dim", 128),
        d_value=f.integer("linear_value_head_dim", 128),
        kernel=f.integer("linear_conv_kernel_dim", 4, least=2),
    )
    if delta.value_heads % delta.key_heads:
        raise f.error(
            f"linear_num_value_heads {delta.value_heads} is no multiple of linear_num_key_heads {delta.key_heads}"
        )
    return plain | {
        "qk_norm": "head",
        "qkv_bias": biased,
        "out_bias": biased,
        "attention_gate": True,
        "state_layers": states,
        "delta_net": delta if states else None,
    }


def _experts(f: ConfigFields, gate: Any, *, per_token: int, experts: int) -> RoutedExperts:
    width, shared = f.integer("moe_intermediate_size", 512), f.integer("shared_expert_intermediate_size", 512)
    return read_experts(
        f, per_token=per_token, experts=experts, width=width, gate=gate, d_shared=shared, shared_gate=True
    )
