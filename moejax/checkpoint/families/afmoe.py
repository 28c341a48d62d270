"""Trinity (Arcee, technical report, 2026). Its second norm of a layer follows attention; the feed-forward part has
norms of its own before and after it."""

from moejax.checkpoint.families.decoder import ATTENTION, LAYER, MLP, decoder_names, expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    routed = expert_names(MLP + "router.gate.weight", MLP + "experts.", shared=MLP + "shared_experts.")
    own = {
        "moe.bias": TensorNames((MLP + "expert_bias",)),
        "attention_gate": TensorNames((ATTENTION + "gate_proj.weight",)),
        "attention_post_norm": TensorNames((LAYER + "post_attention_layernorm.weight",)),
        "ffn_norm": TensorNames((LAYER + "pre_mlp_layernorm.weight",)),
        "ffn_post_norm": TensorNames((LAYER + "post_mlp_layernorm.weight",)),
    }
    return decoder_names(cfg) | routed | own


AFMOE = ServedFamily(names=names, only={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1})
