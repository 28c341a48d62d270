"""OLMoE (arXiv 2409.02060): queries and keys normed over all heads, gates a share of the softmax over all experts."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts


def read_olmoe(f: ConfigFields) -> dict[str, Any]:
    """OLMoE: every layer routed."""
    plain, biased = read_decoder(f, context=4096, stop=(50279,), norm_eps=1e-5), f.flag("attention_bias", False)
    gate = "softmax" if f.flag("norm_topk_prob", False) else "share"
    return plain | {
        "experts": read_experts(f, per_token=8, width=plain["dense_width"], gate=gate),
        "qk_norm": "all",
        "clip_qkv": f.number("clip_qkv", None),
        "qkv_bias": biased,
        "out_bias": biased,
    }
