"""Mistral since 2025: Ministral 3 (arXiv 2601.08584), whose queries grow with position, Mistral 4, which adds latent
attention and experts, and the decoders of text of models that also take images."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_experts, read_head_size
from planner.inputs.published.deepseek import read_latent_decoder
from planner.inputs.published.llama import read_mistral
from planner.inputs.score_growth import PublishedScoreGrowth

_STRETCH = {
    "rope_type": "yarn",
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_ministral3(f: ConfigFields) -> dict[str, Any]:
    """Ministral 3: a dense decoder."""
    f = _with_rope(f, {"rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384})
    plain = read_decoder(
        f, kv_heads=8, context=262_144, stop=(2,), norm_eps=1e-5, head_size=read_head_size(f, 128), rope_base=1e6
    )
    window = f.integer("sliding_window", None)
    return plain | {"windows": (window,) * plain["layers"], "score_growth": _score_growth(f)}


def read_mistral4(f: ConfigFields) -> dict[str, Any]:
    """Mistral 4: DeepSeek-V3's attention; gates are shares of a softmax, and a group counts by its two best experts."""
    f = _with_rope(f, {"rope_theta": 1e4, "factor": 128.0, "original_max_position_embeddings": 8192})
    width = f.integer("moe_intermediate_size", 2048)
    experts = read_experts(
        f,
        per_token=4,
        experts=128,
        width=width,
        d_shared=f.integer("n_shared_experts", 1, null=0, least=0) * width,
        gate="biased_share",
        normalised=f.flag("norm_topk_prob", True),
        gate_scale=f.number("routed_scaling_factor", 1.0),
        groups=f.integer("n_group", 1, null=1),
        groups_used=f.integer("topk_group", 1, null=1),
    )
    plain = read_latent_decoder(f, experts, context=1_048_576, stop=(2,), d_plain=64, d_query=1024, d_latent=256)
    return plain | read_dense_layers(f, 0) | {"score_growth": _score_growth(f)}


def read_mistral3(f: ConfigFields) -> dict[str, Any]:
    """The decoder of text of a model that also takes images: Mistral (Small 3), Ministral 3 or Mistral 4."""
    readers = {"mistral": read_mistral, "ministral3": read_ministral3, "mistral4": read_mistral4}
    kind = f.text("model_type", "mistral")
    if kind not in readers:
        raise f.error(f"model_type of text_config is {kind!r}; known are {', '.join(map(repr, readers))}")
    return readers[kind](f)


def _with_rope(f: ConfigFields, stretch: dict[str, Any]) -> ConfigFields:
    """The fields, with the rotary embedding of the family's class where the configuration gives none."""
    if f.has("rope_parameters") or f.has("rope_scaling"):
        return f
    return ConfigFields({**f.values, "rope_parameters": _STRETCH | stretch}, f.where)


def _score_growth(f: ConfigFields) -> PublishedScoreGrowth | None:
    rope = f.nested("rope_parameters") or f.nested("rope_scaling")
    scale = rope.number("llama_4_scaling_beta", 0.0) if rope is not None else 0.0
    if rope is None or not scale:
        return None
    every = rope.integer("original_max_position_embeddings")
    return PublishedScoreGrowth(scale=scale, every=every, first=0, all_layers=True)
