"""Small models of the families whose layers with a window have heads or a rotary embedding of their own. Windows are
shorter than the prompt, and heads of both kinds of layers are of odd sizes."""

from typing import Any

FULL, WINDOW = "full_attention", "sliding_attention"


def by_kind(window: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of both kinds of layers."""
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    return {"rope_parameters": {WINDOW: plain | window, FULL: plain | full}}


MIMO_V2: list[dict[str, Any]] = [
    {
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "v_head_dim": 16,
        "sliding_window": 20,
        "n_routed_experts": 5,
        "moe_intermediate_size": 24,
    },
    {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 277,
        "head_dim": 20,
        "v_head_dim": 12,
        "sliding_window": 7,
        "layer_types": [WINDOW, FULL, WINDOW],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "n_routed_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 20,
        "attention_bias": True,
        "routed_scaling_factor": 1.7,
        **by_kind({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.8, "rope_theta": 500_000.0}),
    },
    {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "v_head_dim": 20,
        "sliding_window_size": 15,
        "layer_types": [WINDOW, WINDOW, FULL],
        "n_routed_experts": 6,
        "n_group": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "attention_value_scale": None,
        "tie_word_embeddings": True,
    },
]
LAGUNA: list[dict[str, Any]] = [
    {
        "num_hidden_layers": 5,
        "layer_types": [WINDOW, FULL, WINDOW, WINDOW, FULL],
        "num_attention_heads_per_layer": [6, 4, 6, 6, 4],
        "head_dim": 20,
        "sliding_window": 20,
        "num_experts": 5,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "moe_routed_scaling_factor": 1.7,
        "moe_router_logit_softcapping": 0.8,
    },
    {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 277,
        "layer_types": [WINDOW, FULL, WINDOW],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "num_attention_heads_per_layer": [3, 6, 3],
        "head_dim": 24,
        "sliding_window": 7,
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 12,
        "attention_bias": True,
        "gating": "per-element",
        **by_kind(
            {"partial_rotary_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    },
    {
        "num_key_value_heads": 1,
        "layer_types": [WINDOW, WINDOW, WINDOW],
        "head_dim": 20,
        "sliding_window": 16,
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "moe_router_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
]
_GEMMA4 = {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "moe_intermediate_size": 24, "pad_token_id": 0}
GEMMA4: list[dict[str, Any]] = [
    _GEMMA4
    | {
        "num_hidden_layers": 6,
        "head_dim": 24,
        "global_head_dim": 40,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
        "sliding_window": 20,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "top_k_experts": 2,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    _GEMMA4
    | {
        "vocab_size": 277,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 20,
        "global_head_dim": 28,
        "layer_types": [WINDOW, FULL, FULL],
        "sliding_window": 7,
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "top_k_experts": 6,
        "moe_intermediate_size": 20,
        **by_kind(
            {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
            {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.8},
        ),
    },
    _GEMMA4
    | {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 20,
        "global_head_dim": 12,
        "attention_k_eq_v": True,
        "layer_types": [WINDOW, WINDOW, FULL],
        "sliding_window": 16,
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "top_k_experts": 1,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
        **by_kind({}, {"rope_type": "default", "rope_theta": 500_000.0}),
    },
]
_DENSE = {"enable_moe_block": False, "num_experts": None, "top_k_experts": None}
GEMMA4_TEXT: list[dict[str, Any]] = [GEMMA4[2], GEMMA4[0] | _DENSE, GEMMA4[1] | _DENSE]
STEP3P7: list[dict[str, Any]] = [
    {
        "num_hidden_layers": 6,
        "layer_types": [FULL, WINDOW, WINDOW, WINDOW, FULL, WINDOW],
        "num_sliding_attention_heads": 6,
        "head_dim": 20,
        "sliding_window": 20,
        "n_routed_experts": 5,
        "moe_intermediate_size": 24,
        "share_expert_dim": 20,
        "swiglu_limits": [0.0, 0.0, 0.0, 0.0, 0.2, 0.3],
        "swiglu_limits_shared": [0.0, 0.4, 0.0, 0.0, None, 0.3],
        "moe_router_scaling_factor": 1.7,
        "pad_token_id": 0,
    },
    {
        "vocab_size": 277,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "layer_types": [WINDOW, FULL, WINDOW, WINDOW],
        "num_nextn_predict_layers": 1,
        "attention_other_setting": {"num_attention_heads": 3, "num_attention_groups": 3, "head_dim": 24},
        "rope_theta": [10_000.0, 500_000.0, 10_000.0, 10_000.0],
        "partial_rotary_factors": [1.0, 0.5, 1.0, 1.0],
        "moe_layers_enum": "0,2",
        "head_dim": 24,
        "sliding_window": 7,
        "n_routed_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 20,
        "share_expert_dim": 12,
        "pad_token_id": 0,
    },
    {
        "num_key_value_heads": 1,
        "layer_types": [WINDOW, FULL, FULL],
        "mlp_layer_types": ["sparse", "sparse", "dense"],
        "head_dim": 20,
        "sliding_window": 16,
        "n_routed_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "share_expert_dim": 24,
        "query_pre_attn_scalar": 33,
        "swiglu_limits": [0.2, 0.0, 0.0],
        "swiglu_limits_shared": [0.3, 0.0, 0.5],
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "pad_token_id": 0,
    },
]
