"""Phi-3.5-MoE (arXiv 2404.14219): Mixtral with layer norms, biases, sparsemixer routing and LongRoPE."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts


def read_phimoe(f: ConfigFields) -> dict[str, Any]:
    """Phi-3.5-MoE: every layer routed."""
    plain = read_decoder(f, kv_heads=8, context=131_072, stop=(2,), rope_base=1e6, norm_eps=1e-5)
    biased, jitter = f.flag("attention_bias", False), f.number("router_jitter_noise", 0.01)
    return plain | {
        "experts": read_experts(f, per_token=2, width=plain["dense_width"], gate="sparsemixer", jitter=jitter),
        "norm": "layer",
        "qkv_bias": biased,
        "out_bias": biased,
        "head_bias": f.flag("lm_head_bias", False),
        "windows": (f.integer("sliding_window", None),) * plain["layers"],
    }
