"""Granite-MoE (Granite 3.0 language models, IBM 2024): Mixtral with scales on embeddings, residuals, scores, logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts


def read_granite_moe(f: ConfigFields) -> dict[str, Any]:
    """Granite-MoE: every layer routed."""
    plain, biased = read_decoder(f, context=2048, stop=(2,)), f.flag("attention_bias", False)
    divisor = f.number("logits_scaling", 1.0)
    if divisor <= 0:
        raise f.error(f"logits_scaling is {divisor}; it must be above 0")
    return plain | {
        "experts": read_experts(f, per_token=2, experts=8, width=plain["dense_width"]),
        "qkv_bias": biased,
        "out_bias": biased,
        "embed_scale": f.number("embedding_multiplier", 1.0),
        "residual_scale": f.number("residual_multiplier", 1.0),
        "score_scale": f.number("attention_multiplier", 1.0),
        "logit_scale": 1.0 / divisor,
    }


def read_granite_moe_shared(f: ConfigFields) -> dict[str, Any]:
    """Granite-MoE with a shared expert of `shared_intermediate_size` (none if that is 0)."""
    plain = read_granite_moe(f)
    shared = f.integer("shared_intermediate_size", 0, least=0)
    return plain | {"experts": dataclasses.replace(plain["experts"], d_shared=shared)}
