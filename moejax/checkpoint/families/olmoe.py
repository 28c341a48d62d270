"""OLMoE (arXiv 2409.02060)."""

from moejax.checkpoint.families.decoder import MLP, decoder_names, expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    return decoder_names(cfg) | expert_names(MLP + "gate.weight", MLP + "experts.")


OLMOE = ServedFamily(names=names)
