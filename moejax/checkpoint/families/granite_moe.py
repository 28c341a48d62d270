"""Granite-MoE (Granite 3.0 language models, IBM 2024). All experts of a layer lie in one tensor."""

from moejax.checkpoint.families.decoder import LAYER, decoder_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.config.model_config import ModelConfig

BLOCK = LAYER + "block_sparse_moe."


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | {
        "moe.router": TensorNames((BLOCK + "router.layer.weight",)),
        "moe.bias": TensorNames(()),
        "moe.experts.gate_up": TensorNames((BLOCK + "input_linear.weight",)),
        "moe.experts.down": TensorNames((BLOCK + "output_linear.weight",)),
    }


def shared_names(cfg: ModelConfig) -> NameMap:
    """The name map of a model with a shared expert."""
    return {
        **names(cfg),
        "moe.shared.gate_up": TensorNames((LAYER + "shared_mlp.input_linear.weight",)),
        "moe.shared.down": TensorNames((LAYER + "shared_mlp.output_linear.weight",)),
    }


GRANITE_MOE_SHARED = ServedFamily(names=shared_names)
GRANITE_MOE = ServedFamily(names=names)
