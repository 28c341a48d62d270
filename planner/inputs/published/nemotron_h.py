"""Nemotron-H (NVIDIA, arXiv 2504.03624) and Nemotron 3 (arXiv 2512.20856): Mamba-2 layers with attention on a few, and
experts without a gate, which Nemotron 3 Super has in a latent.

A published block is one part of a layer: Mamba-2 or attention, or what follows it, a dense part or experts. A layer is
here what it is in other families: Mamba-2 or attention, and the block after it if that is a feed-forward part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.inputs.layer_states import Mamba2
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_head_size
from planner.inputs.published.deepseek import read_sigmoid_experts
from planner.inputs.routed_experts import RoutedExperts

MAMBA, ATTENTION, ROUTED, DENSE = "linear_attention", "full_attention", "moe", "mlp"
LETTERS = {"M": MAMBA, "*": ATTENTION, "E": ROUTED, "-": DENSE}
EARLIER = {"mamba": MAMBA, "attention": ATTENTION}
UNBOUNDED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
"""How files write that step sizes have no bounds: transformers 5 has an object, as JSON has no infinity."""


def read_nemotron_h(f: ConfigFields) -> dict[str, Any]:
    """Nemotron-H. Its attention has no rotary embedding."""
    mixers, parts = _layers(f, _blocks(f))
    states = tuple(i for i, mixer in enumerate(mixers) if mixer == MAMBA)
    if not 0 < len(states) < len(mixers):
        raise f.error(
            f"{len(states)} of {len(mixers)} layers are Mamba-2; at least one must be that and one have attention"
        )
    counted = {"num_hidden_layers": len(mixers), "rms_norm_eps": f.number("layer_norm_epsilon", 1e-5)}
    f = ConfigFields({**f.values, **counted}, f.where)
    dense = f.integer("intermediate_size", 21_504)
    plain = read_decoder(f, kv_heads=8, context=4096, stop=(2,), head_size=read_head_size(f, 128), dense_width=dense)
    return plain | {
        "unrotated_layers": tuple(range(len(mixers))),
        "state_layers": states,
        "mamba": _mamba(f),
        "experts": _experts(f) if ROUTED in parts else None,
        "dense_layers": tuple(i for i, part in enumerate(parts) if part == DENSE),
        "bare_layers": tuple(i for i, part in enumerate(parts) if not part),
        "activation": "relu2",
    }


def _blocks(f: ConfigFields) -> list[str]:
    """The kind of each published block."""
    for key in ("layers_block_type", "layer_types"):
        if f.has(key):
            blocks = [str(EARLIER.get(each, each)) for each in f.listed(key, str)]
            if unknown := set(blocks) - set(LETTERS.values()):
                raise f.error(f"{key} names {min(unknown)!r}; known are {', '.join(LETTERS.values())}")
            break
    else:
        pattern = f.text("hybrid_override_pattern", "ME*-")
        if unknown := set(pattern) - set(LETTERS):
            raise f.error(f"hybrid_override_pattern has {min(unknown)!r}; known are {', '.join(LETTERS)}")
        blocks = [LETTERS[each] for each in pattern]
    if f.integer("num_hidden_layers", len(blocks)) != len(blocks):
        raise f.error(f"num_hidden_layers is {f.values['num_hidden_layers']}, but {len(blocks)} blocks are named")
    return blocks


def _layers(f: ConfigFields, blocks: list[str]) -> tuple[list[str], list[str]]:
    """Of each layer whether it is Mamba-2 or attention, and its feed-forward part, empty where it has none."""
    mixers: list[str] = []
    parts: list[str] = []
    for i, block in enumerate(blocks):
        if block in (MAMBA, ATTENTION):
            mixers.append(block)
            parts.append("")
        elif not parts or parts[-1]:
            raise f.error(f"block {i} is {block}, but none of {MAMBA} or {ATTENTION} stands before it")
        else:
            parts[-1] = block
    return mixers, parts


def _mamba(f: ConfigFields) -> Mamba2:
    mamba = Mamba2(
        heads=f.integer("mamba_num_heads", 128),
        d_head=f.integer("mamba_head_dim", 64),
        groups=f.integer("mamba_n_groups", f.integer("n_groups", 8)),
        d_state=f.integer("ssm_state_size", 128),
        kernel=f.integer("mamba_d_conv", f.integer("conv_kernel", 4, least=2), least=2),
        biased=f.flag("mamba_conv_bias", f.flag("use_conv_bias", True)),
    )
    if mamba.heads % mamba.groups:
        raise f.error(f"mamba_num_heads {mamba.heads} is no multiple of n_groups {mamba.groups}")
    for key in ("time_step_limit", "mamba_dt_limit"):
        if f.has(key) and f.values[key] not in UNBOUNDED:
            raise f.error(f"{key} is {f.values[key]!r}; step sizes with bounds are not supported")
    return mamba


def _experts(f: ConfigFields) -> RoutedExperts:
    """The shared expert has a width of its own."""
    plain = read_sigmoid_experts(f, width=7688, experts=8, per_token=2)
    return dataclasses.replace(
        plain,
        d_shared=f.integer("moe_shared_expert_intermediate_size", 7688),
        activation="relu2",
        d_latent=f.integer("moe_latent_size", 0, null=0),
    )
