"""OLMoE (arXiv 2409.02060): queries and keys normed over all heads, gates a share of the softmax over all experts."""

from typing import Any

from moejax.config import ModelConfig, MoEConfig
from moejax.families.decoder import MLP, decoder_names, expert_names, read_decoder, read_experts
from moejax.families.family import Family, NameMap
from moejax.families.fields import Fields


def read(f: Fields) -> dict[str, Any]:
    """Fields of ModelConfig."""
    plain, biased = read_decoder(f, norm_eps=1e-5), f.flag("attention_bias", False)
    moe = MoEConfig(
        **read_experts(f),
        d_expert=plain["d_ff"],
        gate="softmax" if f.flag("norm_topk_prob", False) else "share",
    )
    clip = f.number("clip_qkv", None)
    return plain | {"qk_norm": "all", "clip_qkv": clip, "qkv_bias": biased, "out_bias": biased, "moe": moe}


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | expert_names(MLP + "gate.weight", MLP + "experts.")


OLMOE = Family(model_type="olmoe", architectures=("OlmoeForCausalLM",), read=read, names=names)
