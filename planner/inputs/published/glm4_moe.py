"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's routing over plain grouped-query attention, half of each head rotated; the
decoder of GLM-4.5V (arXiv 2507.01006); GLM-4.7-Flash, which has DeepSeek-V3's latent attention; GLM-5, which has that
of DeepSeek-V3.2; and Solar Open (arXiv 2601.07022), which rotates whole heads and routes every layer."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_head_size
from planner.inputs.published.deepseek import read_indexer, read_latent_decoder, read_sigmoid_experts


def read_glm4_moe(f: ConfigFields) -> dict[str, Any]:
    """GLM-4.5: biases on queries, keys and values if `attention_bias`, never on the output."""
    plain = read_decoder(f, kv_heads=8, context=131_072, norm_eps=1e-5, partial=0.5)
    return plain | {
        "qkv_bias": f.flag("attention_bias", False),
        "qk_norm": "head" if f.flag("use_qk_norm", False) else "none",
        "experts": read_sigmoid_experts(f, width=1408, groups=1, used=1, scale=1.0),
        **read_dense_layers(f, 1),
    }


def read_glm4v_moe(f: ConfigFields) -> dict[str, Any]:
    """GLM-4.5V's decoder of text. Its positions by time, height and width are one and the same for text."""
    plain = read_decoder(f, kv_heads=8, context=65_536, norm_eps=1e-5, partial=0.5)
    experts = read_sigmoid_experts(f, width=1408, experts=128)
    return plain | {"qkv_bias": f.flag("attention_bias", True), "experts": experts} | read_dense_layers(f, 1)


def read_glm4_moe_lite(f: ConfigFields) -> dict[str, Any]:
    """GLM-4.7-Flash: the first layer dense unless `mlp_layer_types` says otherwise."""
    experts = read_sigmoid_experts(f, width=1536, scale=1.8, per_token=4, experts=64)
    plain = read_latent_decoder(
        f, experts, context=202_752, stop=(1,), norm_eps=1e-5, d_plain=192, d_value=256, d_query=768
    )
    return plain | read_dense_layers(f, 1)


def read_glm_moe_dsa(f: ConfigFields) -> dict[str, Any]:
    """GLM-5 (arXiv 2602.15763). Layers that take the choice of an earlier layer (arXiv 2603.12201) are refused."""
    experts = read_sigmoid_experts(f, width=2048, experts=256, scale=2.5)
    plain = read_latent_decoder(
        f, experts, context=202_752, stop=(1,), norm_eps=1e-5, d_plain=192, d_value=256, d_query=2048
    )
    shared = "shared" in f.listed("indexer_types", str, ()) or "S" in str(f.values.get("index_topk_pattern") or "")
    if shared or f.integer("index_topk_freq", 1, null=1, least=0) > 1:
        raise f.error("indexer_types has layers that share the choice of another layer; those are not supported yet")
    return plain | read_dense_layers(f, 3) | {"indexer": read_indexer(f, heads=32)}


def read_solar_open(f: ConfigFields) -> dict[str, Any]:
    """Solar Open: every layer routed."""
    experts = read_sigmoid_experts(f, width=1280, experts=128)
    plain = read_decoder(
        f,
        kv_heads=8,
        context=131_072,
        norm_eps=1e-5,
        rope_base=1e6,
        head_size=read_head_size(f, 128),
        dense_width=experts.d_expert,
    )
    return plain | {"qkv_bias": f.flag("attention_bias", False), "experts": experts}
