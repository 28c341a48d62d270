"""Laguna (Poolside, 2026)."""

from moejax.checkpoint.families.decoder import ATTENTION, MLP, decoder_names, expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    own = {
        "moe.bias": TensorNames((MLP + "experts.e_score_correction_bias",)),
        "attention_gate": TensorNames((ATTENTION + "g_proj.weight",)),
    }
    return decoder_names(cfg) | expert_names(MLP + "gate.weight", MLP + "experts.", shared=MLP + "shared_expert.") | own


LAGUNA = ServedFamily(names=names, only={"moe_apply_router_weight_on_input": False})
