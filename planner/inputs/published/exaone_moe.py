"""K-EXAONE (LG AI Research, arXiv 2601.01739): DeepSeek-V3's routing; windows on most layers, and no rotary embedding
on the others."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_windows
from planner.inputs.published.deepseek import read_sigmoid_experts


def read_exaone_moe(f: ConfigFields) -> dict[str, Any]:
    """K-EXAONE: every `sliding_window_pattern`-th layer sees everything, unless `layer_types` says otherwise."""
    plain = read_decoder(f, kv_heads=32, context=2048, stop=(53,), norm_eps=1e-5)
    window = f.integer("sliding_window", 4096, null=None)
    each = 1 if window is None or f.has("layer_types") else f.integer("sliding_window_pattern", 4)
    windows = read_windows(f, window, tuple((i + 1) % each != 0 for i in range(plain["layers"])))
    experts = read_sigmoid_experts(f, width=1024, scale=2.5, experts=64, shared_key="num_shared_experts")
    return plain | {
        "qk_norm": "head",
        "windows": windows,
        "unrotated_layers": () if window is None else tuple(i for i, each in enumerate(windows) if each is None),
        "experts": experts,
        **read_dense_layers(f, 1),
    }
