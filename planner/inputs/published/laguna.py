"""Laguna (Poolside, 2026): windows mixed with full attention, each kind with its number of heads and its rotary
embedding, attention gated by a softplus, DeepSeek-V3's routing with capped logits."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_experts, read_windows
from planner.inputs.published.model import PublishedWindowed
from planner.inputs.published.windowed import FULL, WINDOW, rope_of_kind, with_windowed, without_rope

GATINGS = (True, "per-head", "per-element")


def read_laguna(f: ConfigFields) -> dict[str, Any]:
    """Laguna. `num_attention_heads_per_layer` must have one number for each kind of layer."""
    size = f.integer("head_dim", 128)
    plain = read_decoder(without_rope(f), kv_heads=8, context=131_072, norm_eps=1e-6, head_size=size)
    layers, context, biased = plain["layers"], plain["context"], f.flag("attention_bias", False)
    windows = read_windows(f, f.integer("sliding_window", 512, null=None), (False,) * layers)
    heads, own_heads = _heads(f, windows, plain["heads"])
    default = f.has("rope_parameters")
    windowed = PublishedWindowed(
        n_heads=own_heads,
        n_kv_heads=plain["kv_heads"],
        d_head=size,
        rope=rope_of_kind(f, WINDOW, size, base=10_000.0, context=context),
    )
    full = {
        "heads": heads,
        "rope": rope_of_kind(f, FULL, size, base=500_000.0, context=context, partial=1.0 if default else 0.5),
        "qk_norm": "head",
        "qkv_bias": biased,
        "out_bias": biased,
        "attention_gate": True,
        "gate_by_head": _gating(f) != "per-element",
        "gate_function": "softplus",
        "experts": read_experts(
            f,
            per_token=8,
            experts=256,
            width=f.integer("moe_intermediate_size", 512),
            d_shared=f.integer("shared_expert_intermediate_size", 512, null=0, least=0),
            gate="sigmoid",
            normalised=True,
            gate_scale=f.number("moe_routed_scaling_factor", 1.0),
            logit_cap=f.number("moe_router_logit_softcapping", 0.0) or None,
            router_bias=True,
        ),
        **read_dense_layers(f, 1),
    }
    return with_windowed(plain | full, windows, windowed)


def _gating(f: ConfigFields) -> bool | str:
    gating = f.values.get("gating", True)
    if gating not in GATINGS:
        raise f.error(f"gating is {gating!r}; known are {', '.join(map(repr, GATINGS))}")
    return gating


def _heads(f: ConfigFields, windows: tuple[int | None, ...], heads: int) -> tuple[int, int]:
    """Query heads of layers that see everything, and of layers with a window."""
    given = f.listed("num_attention_heads_per_layer", int, ()) or (heads,) * len(windows)
    if len(given) != len(windows):
        raise f.error(
            f"num_attention_heads_per_layer has {len(given)} entries, but num_hidden_layers is {len(windows)}"
        )
    found = []
    for kind, is_windowed in (("full_attention", False), ("sliding_attention", True)):
        counts = {n for n, window in zip(given, windows, strict=True) if (window is not None) == is_windowed}
        if len(counts) > 1:
            raise f.error(
                f"num_attention_heads_per_layer has {', '.join(map(str, sorted(counts)))} for layers of {kind}; layers "
                "of one kind that differ in it are not supported"
            )
        found.append(next(iter(counts), heads))
    return found[0], found[1]
