"""Trinity (Arcee, technical report, 2026): windows on most layers, no rotary embedding on the others, gated attention,
norms before and after each part, DeepSeek-V3's routing."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_head_size, read_windows
from planner.inputs.published.deepseek import read_sigmoid_experts


def read_afmoe(f: ConfigFields) -> dict[str, Any]:
    """Trinity: every `global_attn_every_n_layers`-th layer sees everything, unless `layer_types` says otherwise."""
    plain = read_decoder(f, context=16_384, norm_eps=1e-5, head_size=read_head_size(f, 128))
    biased, each = f.flag("attention_bias", False), f.integer("global_attn_every_n_layers", 4)
    sliding = tuple((i + 1) % each != 0 for i in range(plain["layers"]))
    windows = read_windows(f, f.integer("sliding_window", 1024, null=None), sliding)
    experts = read_sigmoid_experts(
        f,
        width=1408,
        per_token=6,
        experts=64,
        scale_key="route_scale",
        shared_key="num_shared_experts",
        shared=2,
    )
    return plain | {
        "qk_norm": "head",
        "qkv_bias": biased,
        "out_bias": biased,
        "windows": windows,
        "unrotated_layers": tuple(i for i, window in enumerate(windows) if window is None),
        "attention_gate": True,
        "post_norms": True,
        "embed_scale": plain["hidden_size"] ** 0.5 if f.flag("mup_enabled", False) else 1.0,
        "experts": experts,
        **read_dense_layers(f, 1, "num_dense_layers"),
    }
