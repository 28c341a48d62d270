"""Small models of the families that were published in 2025 and 2026: head sizes that are no share of the model, odd
numbers of experts, one or all of them chosen, windows shorter than the prompt, vocabularies that are no multiple of
8."""

import dataclasses
from typing import Any

from planner.inputs.published.mistral_format import FAMILY
from tests.support.families.case import LATENT, YARN, Case
from tests.support.families.cases_growing import GLM_DSA, MINISTRAL3, MISTRAL3, MISTRAL4, MISTRAL_FORMAT, V32
from tests.support.families.cases_states import BAILING, KIMI_LINEAR, NEMOTRON_H
from tests.support.families.cases_windowed import GEMMA4, GEMMA4_TEXT, LAGUNA, MIMO_V2, STEP3P7

ODD_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20}
WIDE_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24}
ODD_WORDS = {"vocab_size": 277}
_LATENT = {key: value for key, value in LATENT.items() if key != "first_k_dense_replace"}
_V3 = {"moe_intermediate_size": 24, "n_routed_experts": 5, "n_shared_experts": 1}
_FULL, _WINDOW = "full_attention", "sliding_attention"


def _rope(**others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0} | others}


_GLM_LITE: list[dict[str, Any]] = [
    _LATENT
    | {"q_lora_rank": 32, "n_routed_experts": 5, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    _LATENT
    | ODD_WORDS
    | {
        "q_lora_rank": None,
        "n_routed_experts": 6,
        "num_experts_per_tok": 6,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "v_head_dim": 16,
        "norm_topk_prob": False,
    },
    _LATENT | {"q_lora_rank": 20, "num_experts_per_tok": 1, "n_shared_experts": 1, "v_head_dim": 20, "n_group": 2},
]
_DOTS1: list[dict[str, Any]] = [
    _V3
    | WIDE_HEADS
    | {
        "first_k_dense_replace": 1,
        "sliding_window": 20,
        "max_window_layers": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    _V3
    | ODD_HEADS
    | ODD_WORDS
    | {
        "n_routed_experts": 6,
        "num_experts_per_tok": 6,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "sliding_window": 7,
        "layer_types": [_FULL, _WINDOW, _FULL],
    },
    _V3 | ODD_HEADS | {"n_routed_experts": 6, "num_experts_per_tok": 1, "n_group": 2, "sliding_window": None},
]
_SOLAR: list[dict[str, Any]] = [
    _V3 | WIDE_HEADS | {"attention_bias": True, "routed_scaling_factor": 1.7},
    _V3 | ODD_HEADS | ODD_WORDS | {"n_shared_experts": 2, "n_routed_experts": 6, "num_experts_per_tok": 6},
    _V3 | ODD_HEADS | {"num_experts_per_tok": 1, "norm_topk_prob": False, "tie_word_embeddings": True},
]
_MINIMAX: list[dict[str, Any]] = [
    WIDE_HEADS | {"num_local_experts": 5, "rotary_dim": 8},
    ODD_HEADS | ODD_WORDS | {"num_local_experts": 6, "num_experts_per_tok": 6, "rotary_dim": 10},
    ODD_HEADS | {"num_local_experts": 6, "num_experts_per_tok": 1, "tie_word_embeddings": True, "rotary_dim": 20},
]
_HY_V3: list[dict[str, Any]] = [
    WIDE_HEADS | {"num_experts": 5, "moe_intermediate_size": 24, "num_shared_experts": 1},
    ODD_HEADS
    | ODD_WORDS
    | {
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 20,
        "num_shared_experts": 2,
        "attention_bias": True,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    },
    ODD_HEADS | {"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "router_scaling_factor": 0.7},
]
_HUNYUAN: list[dict[str, Any]] = [
    WIDE_HEADS | {"num_experts": 5, **_rope(rope_type="dynamic", alpha=100.0, factor=1.0)},
    ODD_HEADS | ODD_WORDS | {"num_experts": 6, "num_experts_per_tok": 6, "attention_bias": True},
    ODD_HEADS | {"num_experts": 5, "num_experts_per_tok": 1, "tie_word_embeddings": True},
]
_ERNIE: list[dict[str, Any]] = [
    WIDE_HEADS
    | {"moe_num_experts": 5, "moe_num_shared_experts": 1, "moe_intermediate_size": 24, "tie_word_embeddings": False},
    ODD_HEADS
    | ODD_WORDS
    | {
        "num_hidden_layers": 5,
        "moe_num_experts": 6,
        "num_experts_per_tok": 6,
        "moe_num_shared_experts": 0,
        "moe_intermediate_size": 20,
        "moe_layer_interval": 2,
        "moe_layer_end_index": 3,
    },
    ODD_HEADS
    | {
        "moe_num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 0,
    },
]
_EXAONE: list[dict[str, Any]] = [
    WIDE_HEADS
    | {
        "num_experts": 5,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 5,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
    },
    ODD_HEADS
    | ODD_WORDS
    | {
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 28,
        "num_shared_experts": 2,
        "sliding_window": 7,
        "layer_types": [_WINDOW, _FULL, _WINDOW],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    },
    ODD_HEADS
    | {
        "num_experts": 6,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "norm_topk_prob": False,
        "layer_types": [_FULL] * 3,
        "sliding_window": 20,
    },
]
_GRANITE: list[dict[str, Any]] = [
    {
        "num_local_experts": 5,
        "shared_intermediate_size": 40,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 6.0,
    },
    ODD_WORDS
    | {
        "num_local_experts": 6,
        "num_experts_per_tok": 6,
        "shared_intermediate_size": 0,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    {"num_local_experts": 5, "num_experts_per_tok": 1, "shared_intermediate_size": 24, "num_key_value_heads": 1},
]
_KIMI: list[dict[str, Any]] = [
    LATENT | {"q_lora_rank": 32, "n_group": 1, "topk_group": 1, "rope_parameters": YARN | {"mscale": 1.0}},
    LATENT | ODD_WORDS | {"q_lora_rank": 20, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8},
    LATENT
    | {
        "q_lora_rank": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
]
_QWEN_VL: list[dict[str, Any]] = [
    WIDE_HEADS
    | {"num_experts": 5, "moe_intermediate_size": 24, **_rope(mrope_section=[4, 4, 4], mrope_interleaved=True)},
    ODD_HEADS
    | ODD_WORDS
    | {
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 20,
        "attention_bias": True,
        "mlp_only_layers": [1],
        **_rope(mrope_section=[4, 3, 3], mrope_interleaved=True),
    },
    ODD_HEADS
    | {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        **_rope(mrope_section=[4, 3, 3], mrope_interleaved=True),
    },
]
_GLM_V: list[dict[str, Any]] = [
    _V3 | WIDE_HEADS | {"first_k_dense_replace": 1, **_rope(mrope_section=[2, 2, 2], partial_rotary_factor=0.5)},
    _V3
    | ODD_HEADS
    | ODD_WORDS
    | {
        "n_routed_experts": 6,
        "num_experts_per_tok": 6,
        "n_group": 2,
        "topk_group": 2,
        "attention_bias": False,
        **_rope(mrope_section=[2, 2, 1], partial_rotary_factor=0.5),
    },
    _V3
    | ODD_HEADS
    | {
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 2,
        "norm_topk_prob": False,
        **_rope(mrope_section=[2, 2, 1], partial_rotary_factor=0.5),
    },
]
_AFMOE: list[dict[str, Any]] = [
    WIDE_HEADS
    | {
        "num_experts": 5,
        "moe_intermediate_size": 24,
        "num_shared_experts": 1,
        "num_hidden_layers": 5,
        "sliding_window": 20,
        "global_attn_every_n_layers": 2,
        "mup_enabled": True,
        "route_scale": 1.7,
    },
    ODD_HEADS
    | ODD_WORDS
    | {
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 20,
        "num_shared_experts": 2,
        "attention_bias": True,
        "sliding_window": 7,
        "layer_types": [_FULL, _WINDOW, _WINDOW],
        "num_dense_layers": 2,
    },
    ODD_HEADS
    | {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "num_dense_layers": 0,
        "tie_word_embeddings": True,
    },
]
_LLAMA4: list[dict[str, Any]] = [
    WIDE_HEADS
    | {
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 5,
        "intermediate_size_mlp": 40,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 20,
        "no_rope_layer_interval": 2,
        "attn_scale": 0.5,
        "floor_scale": 7,
    },
    ODD_HEADS
    | ODD_WORDS
    | {
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 40,
        "attention_chunk_size": 7,
        "no_rope_layers": [1, 1, 0],
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
    },
    ODD_HEADS
    | {
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 40,
        "moe_layers": [0, 2],
        "attention_chunk_size": 16,
        "no_rope_layers": [0, 1, 1],
        "floor_scale": 16,
        "tie_word_embeddings": True,
    },
]
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_DELTA |= {"linear_key_head_dim": 12, "linear_value_head_dim": 20}
_STATE = "linear_attention"
_QWEN_NEXT: list[dict[str, Any]] = [
    WIDE_HEADS
    | _DELTA
    | {
        "num_hidden_layers": 6,
        "num_experts": 5,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
    },
    ODD_HEADS
    | ODD_WORDS
    | _DELTA
    | {
        "num_hidden_layers": 5,
        "layer_types": [_STATE, _FULL, _STATE, _FULL, _STATE],
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 12,
        "linear_conv_kernel_dim": 3,
        "linear_num_value_heads": 6,
        "mlp_only_layers": [0],
        "norm_topk_prob": False,
        **_rope(partial_rotary_factor=0.5),
    },
    ODD_HEADS
    | _DELTA
    | {
        "layer_types": [_FULL, _STATE, _STATE],
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "linear_conv_kernel_dim": 2,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 8,
        "tie_word_embeddings": True,
        **_rope(partial_rotary_factor=0.2),
    },
]
_QWEN_3_5: list[dict[str, Any]] = [
    {key: value for key, value in fields.items() if key not in ("mlp_only_layers", "norm_topk_prob")}
    for fields in _QWEN_NEXT
]
_QWEN_3_5_DENSE: list[dict[str, Any]] = [
    {key: value for key, value in fields.items() if "expert" not in key and key != "moe_intermediate_size"}
    for fields in _QWEN_3_5
]
_CONV = "conv"
_LFM2: list[dict[str, Any]] = [
    ODD_HEADS
    | {
        "num_hidden_layers": 6,
        "layer_types": [_CONV, _CONV, _FULL, _CONV, _CONV, _FULL],
        "num_dense_layers": 2,
        "num_experts": 5,
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.5,
    },
    WIDE_HEADS
    | ODD_WORDS
    | {
        "num_hidden_layers": 5,
        "layer_types": [_FULL, _CONV, _FULL, _CONV, _CONV],
        "num_dense_layers": 1,
        "num_experts": 6,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 20,
        "conv_L_cache": 4,
        "conv_bias": True,
        "norm_topk_prob": False,
        "use_expert_bias": False,
        "tie_word_embeddings": False,
        "norm_eps": 1e-3,
    },
    ODD_HEADS
    | {
        "layer_types": [_CONV, _FULL, _CONV],
        "num_dense_layers": 0,
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "conv_L_cache": 2,
        **_rope(rope_theta=500_000.0),
    },
]
_VISION: dict[str, dict[str, Any]] = {
    "kimi_k25": {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},
    "qwen3_vl_moe": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "qwen3_5_moe": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
    "glm4v_moe": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64},
    "mistral3": {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    },
    "llama4": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "image_size": 28,
    },
    "gemma4": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "position_embedding_size": 8,
    },
    "step3p7": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}
_TEXT_TYPES = {"kimi_k25": "deepseek_v3", "qwen3_vl_moe": "qwen3_vl_moe_text", "glm4v_moe": "glm4v_moe_text"}
_VISION["qwen3_5"] = _VISION["qwen3_5_moe"]
_TEXT_TYPES |= {"llama4": "llama4_text", "qwen3_5_moe": "qwen3_5_moe_text", "qwen3_5": "qwen3_5_text"}
_TEXT_TYPES |= {"step3p7": "step3p5", "gemma4": "gemma4_text"}
_BY_FAMILY = {
    "glm4_moe_lite": _GLM_LITE,
    "dots1": _DOTS1,
    "solar_open": _SOLAR,
    "minimax_m2": _MINIMAX,
    "hy_v3": _HY_V3,
    "hunyuan_v1_moe": _HUNYUAN,
    "ernie4_5_moe": _ERNIE,
    "exaone_moe": _EXAONE,
    "granitemoeshared": _GRANITE,
    "kimi_k25": _KIMI,
    "qwen3_vl_moe": _QWEN_VL,
    "glm4v_moe": _GLM_V,
    "afmoe": _AFMOE,
    "mimo_v2_flash": MIMO_V2,
    "laguna": LAGUNA,
    "step3p7": STEP3P7,
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4_TEXT,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_moe": _QWEN_3_5,
    "qwen3_5": _QWEN_3_5_DENSE,
    "lfm2_moe": _LFM2,
    "nemotron_h": NEMOTRON_H,
    "kimi_linear": KIMI_LINEAR,
    "bailing_hybrid": BAILING,
    "deepseek_v32": V32,
    "glm_moe_dsa": GLM_DSA,
    "ministral3": MINISTRAL3,
    "mistral4": MISTRAL4,
    "mistral3": MISTRAL3,
}


def _case(family: str, fields: dict[str, Any]) -> Case:
    if family not in _VISION:
        return Case(family, fields)
    beside = {"vision_config": _VISION[family], "tie_word_embeddings": fields.get("tie_word_embeddings", False)}
    return Case(family, fields, beside=beside, text_type=fields.get("model_type") or _TEXT_TYPES[family])


CASES_2026 = {family: _case(family, cases[0]) for family, cases in _BY_FAMILY.items()}
CASES_2026["step3p5"] = dataclasses.replace(
    CASES_2026["step3p7"], rewrite={"model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"]}
)
ODD = {
    f"{family}, {which}": _case(family, fields)
    for family, cases in _BY_FAMILY.items()
    for which, fields in zip(("all", "one"), cases[1:], strict=True)
}
"""The same families with all experts chosen, and with one."""
_OWN = {name: Case(kind, fields, rewrite={"model_type": FAMILY}) for name, (kind, fields) in MISTRAL_FORMAT.items()}
CASES_2026[FAMILY] = _OWN.pop(FAMILY)
ODD |= _OWN
