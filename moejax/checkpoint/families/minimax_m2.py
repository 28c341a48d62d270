"""MiniMax-M2 (MiniMax, 2025): the tensor names of Mixtral, and a bias of the router."""

from moejax.checkpoint.families import mixtral
from moejax.checkpoint.families.deepseek import next_token_layers
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return {**mixtral.names(cfg), "moe.bias": TensorNames((mixtral.BLOCK + "e_score_correction_bias",))}


MINIMAX_M2 = ServedFamily(
    names=names,
    only={"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer"},
    unused=next_token_layers,
)
