"""LFM2-MoE (Liquid, 2025; LFM2 technical report, arXiv 2511.23404): gated short convolutions on three of four layers,
grouped-query attention on the others, sigmoid routing after the first dense layers."""

from __future__ import annotations

from typing import Any

from planner.inputs.layer_states import ShortConvolution
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import layers_of_kind, read_decoder, read_dense_layers, read_experts

SUM_EPSILON = 1e-6
"""Added to the sum of the chosen scores before they are divided by it, as the published code does."""


def read_lfm2_moe(f: ConfigFields) -> dict[str, Any]:
    """LFM2-MoE. Its class calls the norms' epsilon `norm_eps`, and takes `tie_embedding` for `tie_word_embeddings`."""
    width = f.integer("intermediate_size", 7168)
    plain = read_decoder(f, kv_heads=8, context=128_000, stop=(2,), rope_base=1e6, dense_width=width)
    _check_unknown(f, plain)
    layers, states = plain["layers"], layers_of_kind(f, "layer_types", "conv", "full_attention")
    if len(states) == layers:
        raise f.error(f"all {layers} layers are conv; at least one must be full_attention")
    convolution = ShortConvolution(kernel=f.integer("conv_L_cache", 3, least=2), biased=f.flag("conv_bias", False))
    experts = read_experts(
        f,
        per_token=4,
        experts=32,
        width=f.integer("moe_intermediate_size", 1792),
        gate="sigmoid",
        normalised=f.flag("norm_topk_prob", True),
        sum_epsilon=SUM_EPSILON,
        gate_scale=f.number("routed_scaling_factor", 1.0),
        router_bias=f.flag("use_expert_bias", True),
    )
    return plain | {
        "norm_eps": f.number("norm_eps", 1e-5),
        "tied_head": _is_tied(f),
        "qk_norm": "head",
        "state_layers": states,
        "short_convolution": convolution if states else None,
        "experts": experts,
        **read_dense_layers(f, 2, "num_dense_layers"),
    }


def _check_unknown(f: ConfigFields, plain: dict[str, Any]) -> None:
    """Raise InputError for fields that the published class does not follow, where they say something else than it."""
    if f.has("mlp_layer_types"):
        raise f.error(f"mlp_layer_types is {f.values['mlp_layer_types']!r}, which lfm2_moe does not have")
    if plain["rope"].size != plain["head_size"]:
        raise f.error(
            f"partial_rotary_factor leaves {plain['rope'].size} of {plain['head_size']} numbers of a head rotated; "
            "lfm2_moe rotates all"
        )
    for key in ("conv_dim", "conv_dim_out"):
        if f.integer(key, plain["hidden_size"]) != plain["hidden_size"]:
            raise f.error(f"{key} is {f.values[key]}, but hidden_size is {plain['hidden_size']}; they must be equal")


def _is_tied(f: ConfigFields) -> bool:
    tied = f.flag("tie_word_embeddings", True)
    if f.has("tie_word_embeddings") and f.flag("tie_embedding", tied) != tied:
        raise f.error(f"tie_embedding is {not tied}, but tie_word_embeddings is {tied}")
    return f.flag("tie_embedding", tied)
