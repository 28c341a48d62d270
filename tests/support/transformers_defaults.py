"""Configurations as `transformers` completes them from a few sizes, recorded for tests that run without it.

.venv/bin/python -m tests.support.transformers_defaults      records them (needs the extra `parity`)
"""

import json
from pathlib import Path
from typing import Any

from planner.inputs.published import FAMILIES, MODELS

RECORDED = Path(__file__).with_suffix(".json")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "intermediate_size": 48,
}
"""The sizes that the reader requires of every configuration."""

ROUTED = {
    "deepseek_v2": {"n_routed_experts": 16, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_routed_experts": 16},
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "kimi_k25": {"n_routed_experts": 16},
    "glm4_moe": {"n_routed_experts": 16},
    "olmoe": {"num_experts": 16},
    "qwen2_moe": {"num_experts": 16},
    "qwen3_moe": {"num_experts": 16},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mamba", "mlp", "mamba"]},
} | {kind: {"num_local_experts": 16} for kind in ("mixtral", "gpt_oss", "llama4_text", "granitemoe", "phimoe")}
_GEMMA4 = {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 16, "top_k_experts": 2}
ROUTED |= {kind: _GEMMA4 | {"moe_intermediate_size": 24} for kind in ("gemma4", "gemma4_text")}
"""The sizes that it requires of families with experts."""

WITHIN = {
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "glm4v_moe": "glm4v_moe_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_5": "qwen3_5_text",
    "mistral3": "mistral4",
    "step3p7": "step3p5",
    "gemma4": "gemma4_text",
}
"""The `model_type` of the decoder of families that have more than one."""

UNKNOWN_TO_TRANSFORMERS = ("kimi_k2", "mistral_format")

IRRELEVANT = (
    *("transformers_version", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "id2label", "label2id", "problem_type", "architectures", "dtype", "initializer_range"),
    *(
        "vision_config",
        "attention_dropout",
        "use_cache",
        "router_aux_loss_coef",
        "output_router_logits",
        "_name_or_path",
    ),
)


VARIANTS = {
    "one key/value head per query head": ("qwen2", {"num_key_value_heads": None}),
    "heads of an even share": ("mixtral", {"head_dim": None}),
    "queries without a latent": ("deepseek_v3", {"q_lora_rank": None}),
    "late windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "alternate windows": ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3}),
    "windows on all layers": ("qwen3_moe", {"use_sliding_window": True}),
    "no window": ("mistral", {"sliding_window": None}),
    "every second layer routed": ("llama4_text", {"interleave_moe_layer_step": 2}),
    "no chunks": ("llama4_text", {"attention_chunk_size": None}),
    "kinds of layers": ("exaone_moe", {"mlp_layer_types": ["sparse", "dense"] * 3, "sliding_window_pattern": 3}),
    "every second layer between two": ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_end_index": 4}),
    "a global layer of two": ("afmoe", {"global_attn_every_n_layers": 2, "mup_enabled": True}),
    "no shared expert": ("granitemoeshared", {"shared_intermediate_size": 0}),
    "attention on every second layer": ("qwen3_next", {"full_attention_interval": 2, "norm_topk_prob": False}),
    "another convolution": ("lfm2_moe", {"conv_L_cache": 5, "conv_bias": True, "tie_embedding": False}),
    "other numbers of heads": (
        "laguna",
        {"layer_types": ["full_attention", *["sliding_attention"] * 2] * 2}
        | {"num_attention_heads_per_layer": [32, 48, 48] * 2, "gating": "per-element"},
    ),
    "key/value heads of windows": ("mimo_v2_flash", {"num_key_value_heads": 2, "sliding_window_size": 64}),
    "kinds of both parts": (
        "kimi_linear",
        {"layer_types": ["linear_attention", "full_attention"] * 3, "mlp_layer_types": ["dense", "sparse"] * 3},
    ),
    "decays without a bound": ("bailing_hybrid", {"kda_safe_gate": False, "layer_group_size": 3, "head_dim": 96}),
    "experts in a latent": ("nemotron_h", {"moe_latent_size": 40, "conv_kernel": 3, "mamba_num_heads": 24}),
    "keys for values": (
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 96, "head_dim": 40},
    ),
    "no experts beside the dense part": ("gemma4_text", {"enable_moe_block": False, "sliding_window": 64}),
    "another indexer": ("deepseek_v32", {"index_topk": 64, "index_head_dim": 96, "index_n_heads": 5}),
    "no stop token": ("llama", {"eos_token_id": None}),
}
"""Fields whose absence, null or value decides about others."""


def given() -> dict[str, dict[str, Any]]:
    """Every configuration by name: the shortest of each family, variants of them, and the presets of moejax."""
    kinds = [kind for kind in FAMILIES if kind not in UNKNOWN_TO_TRANSFORMERS]
    configs = {kind: _shortest(kind) for kind in kinds}
    configs |= {name: _shortest(kind) | fields for name, (kind, fields) in VARIANTS.items()}
    for path in sorted(MODELS.glob("*.json")):
        values = json.loads(path.read_text())
        known = values["model_type"] in FAMILIES
        configs[path.stem] = values if known else values.get("text_config", values)
    return {name: values for name, values in configs.items() if values["model_type"] not in UNKNOWN_TO_TRANSFORMERS}


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that `transformers` reads from a configuration now."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**json.loads(json.dumps(values)))
    return _relevant(config.to_dict())


def _relevant(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that the reader can read, also of the decoder within."""
    kept = {key: value for key, value in sorted(values.items()) if key not in IRRELEVANT}
    return kept | {key: _relevant(kept[key]) for key in ("text_config",) if key in kept}


def recorded() -> dict[str, dict[str, Any]]:
    """The recorded fields of each configuration, by name."""
    return json.loads(RECORDED.read_text())


def _shortest(kind: str) -> dict[str, Any]:
    """The shortest configuration of a family that the reader takes."""
    sizes = SIZES | ROUTED.get(kind, {})
    if kind not in WITHIN:
        return {"model_type": kind} | sizes
    return {"model_type": kind, "tie_word_embeddings": False, "text_config": {"model_type": WITHIN[kind]} | sizes}


def main() -> None:
    """Record them all."""
    rows = (f"{json.dumps(name)}: {json.dumps(completed(values))}" for name, values in given().items())
    RECORDED.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
