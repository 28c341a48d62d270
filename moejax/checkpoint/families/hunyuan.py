"""Hunyuan-A13B (Tencent, 2025) and Hy3 (Tencent, 2026)."""

from moejax.checkpoint.families.decoder import ATTENTION, MLP, decoder_names, expert_names
from moejax.checkpoint.families.deepseek import next_token_layers
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Hunyuan-A13B's name map."""
    norms = {
        "query_norm": TensorNames((ATTENTION + "query_layernorm.weight",)),
        "key_norm": TensorNames((ATTENTION + "key_layernorm.weight",)),
    }
    return (
        decoder_names(cfg) | norms | expert_names(MLP + "gate.wg.weight", MLP + "experts.", shared=MLP + "shared_mlp.")
    )


def hy_v3_names(cfg: ModelConfig) -> NameMap:
    """Hy3's name map."""
    routed = expert_names(MLP + "router.gate.weight", MLP + "experts.", shared=MLP + "shared_mlp.")
    return decoder_names(cfg) | routed | {"moe.bias": TensorNames((MLP + "expert_bias",))}


HUNYUAN_V1_MOE = ServedFamily(names=names, only={"use_qk_norm": True, "use_cla": False, "mlp_bias": False})
HY_V3 = ServedFamily(names=hy_v3_names, only={"mlp_bias": False}, unused=next_token_layers)
