"""gpt-oss (arXiv 2508.10925): attention sinks, a window on every other layer, biases, a clamped SwiGLU."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts, read_head_size, read_windows

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The rotary scaling of a configuration that gives none."""


def read_gpt_oss(f: ConfigFields) -> dict[str, Any]:
    """gpt-oss: every layer routed, router and experts with biases."""
    if not f.has("rope_parameters") and not f.has("rope_scaling"):
        f = dataclasses.replace(f, values={**f.values, "rope_scaling": YARN})
    size = read_head_size(f, 64)
    plain = read_decoder(f, kv_heads=8, context=131_072, rope_base=150_000.0, norm_eps=1e-5, head_size=size)
    experts = read_experts(
        f,
        per_token=4,
        width=plain["dense_width"],
        router_bias=True,
        expert_bias=True,
        swiglu_limit=f.number("swiglu_limit", 7.0),
        swiglu_alpha=f.number("swiglu_alpha", 1.702),
    )
    biased = f.flag("attention_bias", True)
    alternate = tuple(i % 2 == 0 for i in range(plain["layers"]))
    windows = read_windows(f, f.integer("sliding_window", 128, null=None), alternate)
    return plain | {"experts": experts, "sinks": True, "qkv_bias": biased, "out_bias": biased, "windows": windows}
