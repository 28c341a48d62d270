"""Llama 4 (Meta, 2025): attention in chunks on most layers, full attention without rotary embedding on every fourth."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_experts, read_head_size
from planner.inputs.score_growth import PublishedScoreGrowth


def read_llama4(f: ConfigFields) -> dict[str, Any]:
    """Llama 4's decoder: one expert per token beside a shared one; dense layers have a width of their own."""
    plain = read_decoder(
        f, kv_heads=8, context=131_072, stop=(2,), rope_base=500_000.0, norm_eps=1e-5, head_size=read_head_size(f, 128)
    )
    layers, width = plain["layers"], plain["dense_width"]
    experts = read_experts(f, per_token=1, experts=16, width=width, d_shared=width, gate="input_sigmoid")
    biased, rotated = f.flag("attention_bias", False), _rotated(f, layers)
    step = f.integer("interleave_moe_layer_step", 1)
    routed = f.listed("moe_layers", int, tuple(range(step - 1, layers, step)))
    return plain | {
        "dense_width": f.integer("intermediate_size_mlp", 16_384),
        "experts": experts,
        "dense_layers": tuple(i for i in range(layers) if i not in routed),
        "qk_norm": "l2" if f.flag("use_qk_norm", True) else "none",
        "qkv_bias": biased,
        "out_bias": biased,
        "windows": _chunks(f, rotated),
        "chunked": True,
        "unrotated_layers": tuple(i for i, each in enumerate(rotated) if not each),
        "score_growth": _score_growth(f),
    }


def _rotated(f: ConfigFields, layers: int) -> tuple[int, ...]:
    """For each layer whether it has a rotary embedding: `no_rope_layers`, where 1 stands for yes."""
    interval = f.integer("no_rope_layer_interval", 4)
    given = f.listed("no_rope_layers", int, ()) or tuple(int((i + 1) % interval != 0) for i in range(layers))
    if len(given) < layers:
        raise f.error(f"no_rope_layers has {len(given)} entries, but num_hidden_layers is {layers}")
    return given[:layers]


def _score_growth(f: ConfigFields) -> PublishedScoreGrowth | None:
    if not f.flag("attn_temperature_tuning", True):
        return None
    return PublishedScoreGrowth(scale=f.number("attn_scale", 0.1), every=f.integer("floor_scale", 8192))


def _chunks(f: ConfigFields, rotated: tuple[int, ...]) -> tuple[int | None, ...]:
    """The chunk that each layer sees; None for layers of full attention."""
    layers, size = len(rotated), f.integer("attention_chunk_size", 8192, null=None)
    chunked = tuple("chunked_attention" if each else "full_attention" for each in rotated)
    kinds = f.listed("layer_types", str, chunked)
    if len(kinds) < layers:
        raise f.error(f"layer_types has {len(kinds)} entries, but num_hidden_layers is {layers}")
    return tuple(size if kind == "chunked_attention" else None for kind in kinds[:layers])
