"""K-EXAONE (LG AI Research, arXiv 2601.01739)."""

from moejax.checkpoint.families.decoder import MLP, decoder_names
from moejax.checkpoint.families.deepseek import next_token_layers, shared_expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    bias = {"moe.bias": TensorNames((MLP + "e_score_correction_bias",))}
    return decoder_names(cfg) | shared_expert_names(cfg) | bias


EXAONE_MOE = ServedFamily(names=names, unused=lambda cfg: (*next_token_layers(cfg), "mtp.*"))
