"""Qwen2-MoE (arXiv 2407.10671), Qwen3-MoE (arXiv 2505.09388), and the decoder of Qwen3-VL (arXiv 2511.21631)."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts, read_windows
from planner.inputs.routed_experts import RoutedExperts


def read_qwen2_moe(f: ConfigFields) -> dict[str, Any]:
    """Qwen2-MoE: biases on queries, keys and values; a shared expert with a gate of its own."""
    layers = f.integer("num_hidden_layers")
    windows: tuple[int | None, ...] = (None,) * layers
    if f.flag("use_sliding_window", False):
        first_full = f.integer("max_window_layers", 28, least=0)
        alternate = tuple(i % 2 == 0 and i < first_full for i in range(layers))
        windows = read_windows(f, f.integer("sliding_window", 4096, null=None), alternate)
    shared = f.integer("shared_expert_intermediate_size", 5632, null=0, least=0)
    experts = _experts(f, per_token=4, width=1408, d_shared=shared, shared_gate=shared > 0)
    plain = read_decoder(f, kv_heads=16, context=32_768)
    return plain | {"qkv_bias": f.flag("qkv_bias", True), "experts": experts, "windows": windows} | _routed_layers(f)


def read_qwen3_moe(f: ConfigFields) -> dict[str, Any]:
    """Qwen3-MoE: queries and keys normed by head; no shared expert."""
    biased = f.flag("attention_bias", False)
    window = f.integer("sliding_window", 4096, null=None) if f.flag("use_sliding_window", False) else None
    plain = read_decoder(f, kv_heads=4, context=32_768)
    parts = {"qk_norm": "head", "qkv_bias": biased, "out_bias": biased, "windows": (window,) * plain["layers"]}
    return plain | parts | {"experts": _experts(f, per_token=8, width=768)} | _routed_layers(f)


def read_qwen3_vl_moe(f: ConfigFields) -> dict[str, Any]:
    """Qwen3-VL's decoder of text: Qwen3-MoE whose gates are always divided by their sum. Its positions by time, height
    and width are one and the same for text."""
    biased = f.flag("attention_bias", False)
    plain = read_decoder(f, kv_heads=16, context=128_000, rope_base=5e5)
    width = f.integer("moe_intermediate_size", 1408)
    experts = read_experts(f, per_token=4, experts=60, width=width, gate="softmax")
    return plain | {"qk_norm": "head", "qkv_bias": biased, "out_bias": biased, "experts": experts} | _routed_layers(f)


def _experts(f: ConfigFields, *, per_token: int, width: int, **shared: Any) -> RoutedExperts:
    gate = "softmax" if f.flag("norm_topk_prob", False) else "share"
    width = f.integer("moe_intermediate_size", width)
    return read_experts(f, per_token=per_token, width=width, gate=gate, **shared)


def _routed_layers(f: ConfigFields) -> dict[str, Any]:
    step, dense = f.integer("decoder_sparse_step", 1), f.listed("mlp_only_layers", int, ())
    return {"sparse_step": step, "dense_layers": dense}
