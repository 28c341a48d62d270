"""ERNIE 4.5 (technical report, Baidu, 2025): experts chosen by a softmax plus a bias, shared experts beside them."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts


def read_ernie4_5_moe(f: ConfigFields) -> dict[str, Any]:
    """ERNIE 4.5: every `moe_layer_interval`-th layer between two layers is routed."""
    plain, biased = (
        read_decoder(f, kv_heads=4, context=131_072, stop=(2,), norm_eps=1e-5, rope_base=5e5, tied=True),
        f.flag("use_bias", False),
    )
    layers, width = plain["layers"], f.integer("moe_intermediate_size", 1536)
    first, step = f.integer("moe_layer_start_index", 1, least=0), f.integer("moe_layer_interval", 1)
    last = f.integer("moe_layer_end_index", -1, least=-1)
    last = layers - 1 if last == -1 else last
    experts = read_experts(
        f,
        per_token=6,
        experts=64,
        width=width,
        d_shared=f.integer("moe_num_shared_experts", 2, null=0, least=0) * width,
        gate="biased_share",
        normalised=True,
        router_bias=True,
    )
    return plain | {
        "qkv_bias": biased,
        "out_bias": biased,
        "mlp_bias": biased,
        "experts": experts,
        "sparse_step": step,
        "dense_layers": tuple(i for i in range(layers) if not first <= i <= last),
    }
