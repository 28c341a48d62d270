"""ERNIE 4.5 (technical report, Baidu, 2025). Rotated numbers of its heads lie in pairs; ours lie in halves."""

from moejax.checkpoint.families.decoder import MLP, decoder_names, expert_names
from moejax.checkpoint.families.deepseek import next_token_layers
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.latent import PairedHeads
from moejax.checkpoint.families.source import Row
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    plain = decoder_names(cfg)
    routed = expert_names(MLP + "gate.weight", MLP + "experts.", shared=MLP + "shared_experts.")
    heads = PairedHeads(cfg.n_heads, cfg.n_kv_heads, cfg.d_head)
    return (
        plain
        | routed
        | {
            "qkv": TensorNames(plain["qkv"].names, heads),
            "moe.bias": TensorNames((MLP + "moe_statics.e_score_correction_bias",), Row()),
        }
    )


ERNIE4_5_MOE = ServedFamily(
    names=names, only={"use_bias": False}, unused=lambda cfg: (*next_token_layers(cfg), "model.mtp_*")
)
