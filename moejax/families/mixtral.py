"""Mixtral (arXiv 2401.04088): every layer routed, softmax over the chosen."""

from typing import Any

from moejax.config import ModelConfig, MoEConfig
from moejax.families.decoder import LAYER, decoder_names, read_decoder, read_experts
from moejax.families.family import Family, NameMap, Names
from moejax.families.fields import Fields
from moejax.families.source import Halves

BLOCK = LAYER + "block_sparse_moe."


def read(f: Fields) -> dict[str, Any]:
    """Fields of ModelConfig."""
    plain = read_decoder(f, rope_base=1e6, norm_eps=1e-5)
    moe = MoEConfig(
        **read_experts(f),
        d_expert=plain["d_ff"],
    )
    return plain | {"moe": moe, "window": f.integer("sliding_window", None)}


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | {
        "moe.router": Names((BLOCK + "gate.weight",)),
        "moe.bias": Names(()),
        "moe.experts.gate_up": Names(
            (BLOCK + "experts.{expert}.w1.weight", BLOCK + "experts.{expert}.w3.weight"), Halves()
        ),
        "moe.experts.down": Names((BLOCK + "experts.{expert}.w2.weight",)),
    }


MIXTRAL = Family(model_type="mixtral", architectures=("MixtralForCausalLM",), read=read, names=names)
