"""Families of models as data: how each `model_type` of Hugging Face spells its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` spells its sizes. Keys name entries of config.json; flags name small parts.

    A family that is not `routed` has no experts.
    """

    routed: bool = True
    experts: str = "num_local_experts"
    expert_width: str = "intermediate_size"
    dense_width: str = "intermediate_size"
    shared_width: Callable[[Config], int] = lambda c: 0
    shared_gate: bool = False
    moe_layers: Callable[[Config], int] = lambda c: c["num_hidden_layers"]
    qkv_bias: bool = False
    out_bias: bool = False
    head_norm: Callable[[Config], int] = lambda c: 0
    sinks: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    norm_bias: bool = False


def _qwen_moe_layers(c: Config) -> int:
    step, dense = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
    return sum(1 for i in range(c["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def _after_dense(c: Config) -> int:
    return c["num_hidden_layers"] - (c.get("first_k_dense_replace") or 0)


def head_size(c: Config) -> int:
    """Size of one attention head."""
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


_DEEPSEEK = {
    "experts": "n_routed_experts",
    "expert_width": "moe_intermediate_size",
    "shared_width": lambda c: (c.get("n_shared_experts") or 0) * c["moe_intermediate_size"],
    "moe_layers": _after_dense,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(routed=False),
    "mistral": Family(routed=False),
    "qwen2": Family(routed=False, qkv_bias=True),
    "qwen3": Family(routed=False, head_norm=lambda c: 2 * head_size(c)),
    "mixtral": Family(),
    "olmoe": Family(
        experts="num_experts",
        head_norm=lambda c: (c["num_attention_heads"] + c["num_key_value_heads"]) * head_size(c),
    ),
    "qwen2_moe": Family(
        experts="num_experts",
        expert_width="moe_intermediate_size",
        shared_width=lambda c: c["shared_expert_intermediate_size"],
        shared_gate=True,
        moe_layers=_qwen_moe_layers,
        qkv_bias=True,
    ),
    "qwen3_moe": Family(
        experts="num_experts",
        expert_width="moe_intermediate_size",
        moe_layers=_qwen_moe_layers,
        head_norm=lambda c: 2 * head_size(c),
    ),
    "deepseek_v2": Family(**_DEEPSEEK),
    "deepseek_v3": Family(**_DEEPSEEK, router_bias=True),
    "kimi_k2": Family(**_DEEPSEEK, router_bias=True),
    "glm4_moe": Family(
        **_DEEPSEEK,
        router_bias=True,
        qkv_bias=True,
        head_norm=lambda c: 2 * head_size(c) if c.get("use_qk_norm") else 0,
    ),
    "gpt_oss": Family(qkv_bias=True, out_bias=True, sinks=True, router_bias=True, expert_bias=True),
    "llama4_text": Family(
        dense_width="intermediate_size_mlp",
        shared_width=lambda c: c["intermediate_size"],
        moe_layers=lambda c: c["num_hidden_layers"] // c.get("interleave_moe_layer_step", 1),
    ),
    "granitemoe": Family(),
    "phimoe": Family(qkv_bias=True, out_bias=True, norm_bias=True),
}
