"""Qwen2-MoE (arXiv 2407.10671), Qwen3-MoE (arXiv 2505.09388), and the decoder of Qwen3-VL (arXiv 2511.21631), whose
experts lie together, `[E, in, out]`, gate before up."""

from moejax.checkpoint.families.decoder import MLP, decoder_names, expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import Transposed
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Their name map."""
    routed = expert_names(MLP + "gate.weight", MLP + "experts.", shared=MLP + "shared_expert.")
    return decoder_names(cfg) | routed | {"moe.shared_gate": TensorNames((MLP + "shared_expert_gate.weight",))}


def fused_names(cfg: ModelConfig) -> NameMap:
    """The name map of a model whose experts lie together."""
    return {
        **names(cfg),
        "moe.experts.gate_up": TensorNames((MLP + "experts.gate_up_proj",), Transposed()),
        "moe.experts.down": TensorNames((MLP + "experts.down_proj",), Transposed()),
    }


QWEN3_VL_MOE = ServedFamily(names=fused_names, moved={"model.": "model.language_model."}, beside=("model.visual.*",))
QWEN2_MOE = QWEN3_MOE = ServedFamily(names=names)
