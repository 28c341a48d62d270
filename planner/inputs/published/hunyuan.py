"""Hunyuan-A13B (Tencent, 2025) and Hy3 (Tencent, 2026)."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_experts, read_head_size
from planner.inputs.published.deepseek import read_sigmoid_experts
from planner.inputs.published.model import PublishedRope


def read_hunyuan_v1_moe(f: ConfigFields) -> dict[str, Any]:
    """Hunyuan-A13B: every layer routed, beside a shared expert of the same width; queries and keys are normed by head
    after they are rotated."""
    plain = read_decoder(f, context=2048, stop=(2,), norm_eps=1e-5)
    width, biased = plain["dense_width"], f.flag("attention_bias", False)
    return plain | {
        "qk_norm": "head",
        "norm_after_rope": True,
        "qkv_bias": biased,
        "out_bias": biased,
        "rope": _stretched(f, plain["rope"], plain["head_size"]),
        "experts": read_experts(f, per_token=1, experts=1, width=width, d_shared=width),
    }


def _stretched(f: ConfigFields, rope: PublishedRope, size: int) -> PublishedRope:
    """NTK-aware scaling with a fixed `alpha` (bloc97, 2023): the base grows by alpha ** (size / (size - 2)), at every
    length. Configurations call it `dynamic`, which without `alpha` is another scaling."""
    scaling = f.nested("rope_parameters") or f.nested("rope_scaling")
    if rope.kind != "dynamic" or scaling is None or not scaling.has("alpha"):
        return rope
    return dataclasses.replace(rope, kind="default", theta=rope.theta * scaling.number("alpha") ** (size / (size - 2)))


def read_hy_v3(f: ConfigFields) -> dict[str, Any]:
    """Hy3: DeepSeek-V3's routing, queries and keys normed by head, the first layer dense."""
    plain = read_decoder(
        f, kv_heads=8, context=131_072, norm_eps=1e-5, rope_base=11_158_840.0, head_size=read_head_size(f, 128)
    )
    biased = f.flag("attention_bias", False)
    experts = read_sigmoid_experts(
        f, width=1536, scale=2.826, experts=192, scale_key="router_scaling_factor", shared_key="num_shared_experts"
    )
    dense = read_dense_layers(f, 1)
    return plain | {"qk_norm": "head", "qkv_bias": biased, "out_bias": biased, "experts": experts} | dense
