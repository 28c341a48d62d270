"""Small models of the families of 2026 with an indexer or with queries that grow with position: DeepSeek-V3.2, GLM-5,
Ministral 3 and Mistral 4. Fewer positions are chosen than the prompt has, and it passes several steps of growth.

Indexers have many heads, so that no two positions have the same score: with few, the scores of many positions are 0,
and which of them `torch.topk` chooses is not defined.
"""

from typing import Any

from tests.support.families.case import LATENT, YARN

_LATENT = {key: value for key, value in LATENT.items() if key != "first_k_dense_replace"}
_INDEX = {"index_n_heads": 15, "index_head_dim": 12, "index_topk": 9}
V32: list[dict[str, Any]] = [
    _LATENT
    | _INDEX
    | {
        "q_lora_rank": 32,
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    _LATENT
    | _INDEX
    | {"vocab_size": 277}
    | {
        "q_lora_rank": 20,
        "n_routed_experts": 6,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "index_topk": 30,
        "index_head_dim": 8,
        "first_k_dense_replace": 0,
        "v_head_dim": 20,
    },
    _LATENT
    | _INDEX
    | {
        "q_lora_rank": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "index_topk": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "n_shared_experts": 1,
        "norm_topk_prob": False,
    },
]
GLM_DSA: list[dict[str, Any]] = [
    fields | {"index_n_heads": heads} for fields, heads in zip(V32, (14, 17, 16), strict=True)
]
_GROWN = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
_GROWN |= {"original_max_position_embeddings": 16}
MINISTRAL3: list[dict[str, Any]] = [
    {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24} | {"rope_parameters": _GROWN},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20}
    | {"vocab_size": 277}
    | {"rope_parameters": _GROWN | {"llama_4_scaling_beta": 0.1}, "tie_word_embeddings": True},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20}
    | {"rope_parameters": _GROWN | {"factor": 2.0}, "sliding_window": 20},
]
MISTRAL4: list[dict[str, Any]] = [
    _LATENT | {"q_lora_rank": 32, "n_routed_experts": 5, "n_shared_experts": 1, "rope_parameters": _GROWN},
    _LATENT
    | {"vocab_size": 277}
    | {
        "q_lora_rank": None,
        "n_routed_experts": 6,
        "num_experts_per_tok": 4,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
        "rope_parameters": _GROWN | {"llama_4_scaling_beta": 0.1},
    },
    _LATENT
    | {
        "q_lora_rank": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 1,
        "v_head_dim": 20,
        "rope_parameters": _GROWN | {"factor": 2.0},
    },
]
_PLAIN_YARN = {key: value for key, value in _GROWN.items() if not key.startswith("mscale")}
MISTRAL_FORMAT: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral_format": (
        "mistral4",
        _LATENT
        | {
            "rms_norm_eps": 1e-6,
            "q_lora_rank": 32,
            "n_routed_experts": 5,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.7,
            "rope_parameters": _PLAIN_YARN | {"attention_factor": 1.0},
        },
    ),
    "mistral_format, all": (
        "mistral4",
        _LATENT
        | {
            "vocab_size": 277,
            "rms_norm_eps": 1e-6,
            "q_lora_rank": 20,
            "n_routed_experts": 6,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "v_head_dim": 20,
            "rope_parameters": _GROWN | {"llama_4_scaling_beta": 0.1},
        },
    ),
    "mistral_format, one": (
        "mixtral",
        {
            "rms_norm_eps": 1e-5,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "head_dim": 20,
            "sliding_window": 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "mistral_format, dense": (
        "ministral3",
        {
            "vocab_size": 277,
            "rms_norm_eps": 1e-5,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 20,
            "tie_word_embeddings": True,
            "rope_parameters": _PLAIN_YARN,
        },
    ),
}
"""By name, the `model_type` in transformers and the fields of models that are then written in Mistral's own format. In
that of `attention_factor` YaRN does not scale scores."""
MISTRAL3: list[dict[str, Any]] = [
    MINISTRAL3[0] | {"model_type": "ministral3"},
    MISTRAL4[1] | {"model_type": "mistral4"},
    {"num_key_value_heads": 1, "head_dim": 24, "sliding_window": 20, "model_type": "mistral"},
]
