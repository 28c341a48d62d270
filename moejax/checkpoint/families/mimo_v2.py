"""MiMo-V2-Flash (Xiaomi, technical report, 2026). Its three layers of multi-token prediction are left out."""

from moejax.checkpoint.families.decoder import ATTENTION, MLP, decoder_names, expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    own = {
        "moe.bias": TensorNames((MLP + "gate.e_score_correction_bias",)),
        "sinks": TensorNames((ATTENTION + "attention_sink_bias",)),
    }
    return decoder_names(cfg) | expert_names(MLP + "gate.weight", MLP + "experts.") | own


MIMO_V2_FLASH = ServedFamily(
    names=names,
    only={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_shared_experts": None},
    unused=lambda cfg: ("model.mtp.*",),
)
