"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's routing over attention with norms of queries and keys by head."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_windows
from planner.inputs.published.deepseek import read_sigmoid_experts


def read_dots1(f: ConfigFields) -> dict[str, Any]:
    """dots.llm1: windows on the layers from `max_window_layers` on, unless `layer_types` says otherwise."""
    plain, biased = read_decoder(f, kv_heads=32, context=2048), f.flag("attention_bias", False)
    window, first = f.integer("sliding_window", 4096, null=None), f.integer("max_window_layers", 62, least=0)
    sliding = tuple(window is not None and i >= first for i in range(plain["layers"]))
    return plain | {
        "qk_norm": "head",
        "qkv_bias": biased,
        "out_bias": biased,
        "windows": read_windows(f, window, sliding),
        "experts": read_sigmoid_experts(f, width=1408, normalised=False, shared=0),
        **read_dense_layers(f, 0),
    }
