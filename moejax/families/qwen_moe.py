"""Qwen2-MoE (arXiv 2407.10671) and Qwen3-MoE (arXiv 2505.09388)."""

from typing import Any

from moejax.config import ModelConfig, MoEConfig
from moejax.families.decoder import (
    MLP,
    decoder_names,
    expert_names,
    read_d_head,
    read_decoder,
    read_experts,
    read_windows,
)
from moejax.families.family import Family, NameMap, Names
from moejax.families.fields import Fields


def read_qwen2_moe(f: Fields) -> dict[str, Any]:
    """Biases on queries, keys and values; an always-on expert with a gate of its own."""
    layers = f.integer("num_hidden_layers")
    windows: dict[str, Any] = {}
    if f.flag("use_sliding_window", False):
        first_full = f.integer("max_window_layers", 28, least=0)
        alternate = tuple(i % 2 == 0 and i < first_full for i in range(layers))
        windows = read_windows(f, f.integer("sliding_window", 4096), alternate)
    moe = _moe(f, d_shared=f.integer("shared_expert_intermediate_size"), shared_gate=True)
    return read_decoder(f) | {"qkv_bias": f.flag("qkv_bias", True), "moe": moe} | windows | _routed_layers(f)


def read_qwen3_moe(f: Fields) -> dict[str, Any]:
    """Queries and keys normed by head; no always-on expert."""
    biased = f.flag("attention_bias", False)
    window = f.integer("sliding_window", 4096) if f.flag("use_sliding_window", False) else None
    plain = read_decoder(f, d_head=read_d_head(f))
    parts = {"qk_norm": "head", "qkv_bias": biased, "out_bias": biased, "window": window, "moe": _moe(f)}
    return plain | parts | _routed_layers(f)


def _moe(f: Fields, **shared: Any) -> MoEConfig:
    return MoEConfig(
        **read_experts(f),
        d_expert=f.integer("moe_intermediate_size"),
        gate="softmax" if f.flag("norm_topk_prob", False) else "share",
        **shared,
    )


def _routed_layers(f: Fields) -> dict[str, Any]:
    return {"moe_every": f.integer("decoder_sparse_step", 1), "dense_layers": f.listed("mlp_only_layers", int, ())}


def names(cfg: ModelConfig) -> NameMap:
    """Their name map."""
    routed = expert_names(MLP + "gate.weight", MLP + "experts.", shared=MLP + "shared_expert.")
    return decoder_names(cfg) | routed | {"moe.shared_gate": Names((MLP + "shared_expert_gate.weight",))}


QWEN2_MOE = Family(model_type="qwen2_moe", architectures=("Qwen2MoeForCausalLM",), read=read_qwen2_moe, names=names)
QWEN3_MOE = Family(model_type="qwen3_moe", architectures=("Qwen3MoeForCausalLM",), read=read_qwen3_moe, names=names)
