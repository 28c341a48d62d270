"""Phi-3.5-MoE (arXiv 2404.14219): Mixtral with layer norms, biases, sparsemixer routing and LongRoPE."""

from typing import Any

from moejax.config import MoEConfig
from moejax.families import mixtral
from moejax.families.decoder import read_decoder, read_experts
from moejax.families.family import Family
from moejax.families.fields import Fields


def read(f: Fields) -> dict[str, Any]:
    """Fields of ModelConfig."""
    plain, biased = read_decoder(f, rope_base=1e6, norm_eps=1e-5), f.flag("attention_bias", False)
    moe = MoEConfig(
        **read_experts(f),
        d_expert=plain["d_ff"],
        gate="sparsemixer",
        jitter=f.number("router_jitter_noise", 0.01),
    )
    return plain | {
        "moe": moe,
        "norm": "layer",
        "qkv_bias": biased,
        "out_bias": biased,
        "head_bias": f.flag("lm_head_bias", False),
        "window": f.integer("sliding_window", None),
    }


PHIMOE = Family(
    model_type="phimoe",
    architectures=("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    read=read,
    names=mixtral.names,
)
