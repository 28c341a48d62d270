"""Mixtral (arXiv 2401.04088)."""

from moejax.checkpoint.families.decoder import LAYER, decoder_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import ConcatHalves
from moejax.config.model_config import ModelConfig

BLOCK = LAYER + "block_sparse_moe."


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | {
        "moe.router": TensorNames((BLOCK + "gate.weight",)),
        "moe.bias": TensorNames(()),
        "moe.experts.gate_up": TensorNames(
            (BLOCK + "experts.{expert}.w1.weight", BLOCK + "experts.{expert}.w3.weight"), ConcatHalves()
        ),
        "moe.experts.down": TensorNames((BLOCK + "experts.{expert}.w2.weight",)),
    }


MIXTRAL = ServedFamily(names=names)
