"""Small models of the families with Mamba-2 and Kimi delta attention: odd sizes of heads and states, groups that are
shared and not, layers without a feed-forward part, experts in a latent."""

from typing import Any

from tests.support.families.case import LATENT

_MAMBA, _FULL, _ROUTED, _DENSE = "linear_attention", "full_attention", "moe", "mlp"
_SIZES: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "n_routed_experts": 5,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 20,
}


def _blocks(*blocks: str) -> dict[str, Any]:
    return {"layers_block_type": list(blocks), "num_hidden_layers": len(blocks)}


NEMOTRON_H: list[dict[str, Any]] = [
    _SIZES
    | _blocks(_MAMBA, _ROUTED, _MAMBA, _FULL, _ROUTED, _MAMBA, _ROUTED, _MAMBA, _FULL, _ROUTED, _MAMBA)
    | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20},
    _SIZES
    | _blocks(_MAMBA, _DENSE, _FULL, _MAMBA, _ROUTED, _FULL, _ROUTED)
    | {
        "vocab_size": 277,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 6,
        "moe_latent_size": 20,
        "norm_topk_prob": False,
        "n_groups": 1,
        "conv_kernel": 3,
        "use_conv_bias": False,
        "layer_norm_epsilon": 1e-3,
    },
    _SIZES
    | _blocks(_FULL, _MAMBA, _ROUTED)
    | {
        "num_experts_per_tok": 1,
        "n_routed_experts": 6,
        "n_group": 2,
        "moe_latent_size": 72,
        "mamba_num_heads": 3,
        "mamba_head_dim": 28,
        "n_groups": 3,
        "conv_kernel": 2,
        "head_dim": 16,
    },
]

_DELTA: dict[str, Any] = LATENT | {"num_experts": 5, "n_shared_experts": 1, "norm_topk_prob": True}
for _name in ("n_routed_experts", "first_k_dense_replace"):
    del _DELTA[_name]


def _kinds(*kinds: str, dense: int = 1) -> dict[str, Any]:
    parts = ["dense"] * dense + ["sparse"] * (len(kinds) - dense)
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds), "mlp_layer_types": parts}


KIMI_LINEAR: list[dict[str, Any]] = [
    _DELTA
    | _kinds(_MAMBA, _MAMBA, _FULL, _MAMBA, _FULL)
    | {"linear_num_heads": 3, "linear_head_dim": 20, "q_lora_rank": None, "routed_scaling_factor": 2.446},
    _DELTA
    | _kinds(_FULL, _MAMBA, _MAMBA, dense=2)
    | {
        "vocab_size": 277,
        "linear_num_heads": 5,
        "linear_head_dim": 12,
        "linear_conv_kernel_dim": 3,
        "q_lora_rank": 20,
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-3,
        "v_head_dim": 20,
    },
    _DELTA
    | _kinds(_MAMBA, _FULL, _MAMBA, dense=0)
    | {
        "linear_num_heads": 2,
        "linear_head_dim": 36,
        "linear_conv_kernel_dim": 2,
        "q_lora_rank": None,
        "num_experts": 6,
        "num_experts_per_tok": 1,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 2,
    },
]
BAILING: list[dict[str, Any]] = [
    _DELTA
    | _kinds(_MAMBA, _MAMBA, _FULL, _MAMBA)
    | {"head_dim": 20, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "num_nextn_predict_layers": 0},
    _DELTA
    | _kinds(_MAMBA, _FULL, _MAMBA, dense=0)
    | {
        "vocab_size": 277,
        "head_dim": 12,
        "short_conv_kernel_size": 3,
        "kda_safe_gate": False,
        "q_lora_rank": 20,
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "n_group": 2,
        "topk_group": 2,
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,
    },
    _DELTA
    | _kinds(_FULL, _MAMBA, _MAMBA)
    | {
        "head_dim": 28,
        "kda_lower_bound": -2.0,
        "q_lora_rank": None,
        "num_experts": 6,
        "num_experts_per_tok": 1,
        "n_group": 2,
        "topk_group": 1,
        "v_head_dim": 20,
        "num_nextn_predict_layers": 0,
    },
]
