"""Granite-MoE (Granite 3.0 language models, IBM 2024): Mixtral with scales on embeddings, residuals, scores and logits.

All experts of a layer lie in one tensor.
"""

from typing import Any

from moejax.config import ModelConfig, MoEConfig
from moejax.families.decoder import LAYER, decoder_names, read_decoder, read_experts
from moejax.families.family import Family, NameMap, Names
from moejax.families.fields import Fields

BLOCK = LAYER + "block_sparse_moe."


def read(f: Fields) -> dict[str, Any]:
    """Fields of ModelConfig."""
    plain, biased = read_decoder(f), f.flag("attention_bias", False)
    moe = MoEConfig(
        **read_experts(f),
        d_expert=plain["d_ff"],
    )
    return plain | {
        "moe": moe,
        "qkv_bias": biased,
        "out_bias": biased,
        "embed_scale": f.number("embedding_multiplier", 1.0),
        "residual_scale": f.number("residual_multiplier", 1.0),
        "attention_scale": f.number("attention_multiplier", 1.0),
        "logit_scale": 1.0 / f.number("logits_scaling", 1.0),
    }


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | {
        "moe.router": Names((BLOCK + "router.layer.weight",)),
        "moe.bias": Names(()),
        "moe.experts.gate_up": Names((BLOCK + "input_linear.weight",)),
        "moe.experts.down": Names((BLOCK + "output_linear.weight",)),
    }


GRANITE_MOE = Family(model_type="granitemoe", architectures=("GraniteMoeForCausalLM",), read=read, names=names)
