"""MiniMax-M2 (MiniMax, 2025): sigmoid routing with a bias and no shared expert, queries and keys normed over all heads,
a part of each head rotated."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts, read_head_size


def read_minimax_m2(f: ConfigFields) -> dict[str, Any]:
    """MiniMax-M2: every layer routed. Published configurations say `rotary_dim` for the part that is rotated."""
    size = read_head_size(f, 128)
    plain = read_decoder(
        f,
        kv_heads=8,
        context=196_608,
        stop=(200_020,),
        rope_base=5e6,
        head_size=size,
        partial=f.integer("rotary_dim", size) / size,
    )
    experts = read_experts(
        f, per_token=8, experts=256, width=plain["dense_width"], gate="sigmoid", normalised=True, router_bias=True
    )
    return plain | {"qk_norm": "all", "experts": experts}
