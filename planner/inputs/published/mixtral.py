"""Mixtral (arXiv 2401.04088): every layer routed, softmax over the chosen experts."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts


def read_mixtral(f: ConfigFields) -> dict[str, Any]:
    """Mixtral: a window on all layers if `sliding_window` is given."""
    plain = read_decoder(f, kv_heads=8, context=131_072, stop=(2,), rope_base=1e6, norm_eps=1e-5)
    experts = read_experts(f, per_token=2, width=plain["dense_width"])
    return plain | {"experts": experts, "windows": (f.integer("sliding_window", None),) * plain["layers"]}
