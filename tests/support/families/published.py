"""Small models of every published family, written as a folder by `transformers` itself: the branches its configurations
can take, with random weights large enough that each of them matters."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.inputs.published.mistral_format import FAMILY
from tests.support.families.case import LATENT, YARN, Case
from tests.support.families.cases_2026 import CASES_2026, ODD
from tests.support.families.mistral_format import in_own_format
from tests.support.published import around_one, is_factor


def _long(which: str) -> dict[str, Any]:
    """LongRoPE. The reference takes short factors at any length, so its long case has the long ones in their place."""
    long = [1.0 + 0.5 * i for i in range(8)]
    short = long if which == "long" else [1.0 + 0.05 * i for i in range(8)]
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    scaling |= {"short_mscale": 1.2, "long_mscale": 1.3 if which == "short" else 1.2}
    original = 256 if which == "short" else 32
    return {
        "rope_parameters": scaling | {"original_max_position_embeddings": original},
        "original_max_position_embeddings": original,
    }


CASES = {
    "mixtral": Case("mixtral", {"num_local_experts": 8}),
    "mixtral, window": Case("mixtral", {"num_local_experts": 8, "sliding_window": 20, "head_dim": 24}),
    "llama 3.1": Case(
        "llama",
        {
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama, tied head, linear rope": Case(
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral": Case("mistral", {"sliding_window": 20}),
    "qwen2": Case("qwen2", {}),
    "qwen3": Case("qwen3", {"head_dim": 24, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen2-moe": Case(
        "qwen2_moe",
        {
            "num_experts": 8,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 5,
        },
    ),
    "qwen2-moe, normalised, window": Case(
        "qwen2_moe",
        {
            "num_experts": 8,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe": Case(
        "qwen3_moe",
        {
            "num_experts": 8,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "head_dim": 24,
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
    ),
    "olmoe": Case("olmoe", {"num_experts": 8, "clip_qkv": 1.5}),
    "olmoe, normalised, biased": Case("olmoe", {"num_experts": 6, "norm_topk_prob": True, "attention_bias": True}),
    "deepseek-v2-lite": Case(
        "deepseek_v2",
        {
            **LATENT,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek-v2": Case(
        "deepseek_v2",
        {
            **LATENT,
            "q_lora_rank": 32,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.6,
        },
    ),
    "deepseek-v3": Case(
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": 32,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek-v3, not normalised": Case(
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 16,
            "v_head_dim": 20,
            "kv_lora_rank": 32,
        },
    ),
    "kimi-k2": Case(
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": 32,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.827,
        },
        rewrite={"model_type": "kimi_k2"},
    ),
    "gpt-oss": Case(
        "gpt_oss",
        {
            "num_local_experts": 8,
            "head_dim": 24,
            "sliding_window": 20,
            "num_hidden_layers": 4,
            "swiglu_limit": 1.5,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "glm-4-moe": Case(
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 24,
            "head_dim": 24,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 1.5,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "glm-4-moe, plain": Case(
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "head_dim": 16,
            "use_qk_norm": False,
            "attention_bias": False,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
        },
    ),
    "granite-moe, biased": Case("granitemoe", {"num_local_experts": 6, "attention_bias": True}),
    "granite-moe": Case(
        "granitemoe",
        {
            "num_local_experts": 8,
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 6.0,
        },
    ),
    "phi-3.5-moe": Case(
        "phimoe",
        {"num_local_experts": 8, "attention_bias": True, "lm_head_bias": True, **_long("short")},
    ),
    "phi-3.5-moe, long": Case(
        "phimoe",
        {"num_local_experts": 8, "router_jitter_noise": 0.3, "sliding_window": 20, **_long("long")},
    ),
    **CASES_2026,
}
"""By name. Between them they have every branch of the decoder but experts in a latent."""


ALL = CASES | ODD
"""Also further configurations of the families of 2026; those of Nemotron-H have experts in a latent."""


def write_folder(folder: Path, case: Case, seed: int) -> Any:
    """Write the model's folder as it would be published, and return transformers' own model of it."""
    import torch
    from transformers import AutoConfig

    torch.manual_seed(seed)
    config = AutoConfig.for_model(case.model_type, **copy.deepcopy(case.placed(case.decoder)))
    config._attn_implementation = "eager"
    model = reference_class(case).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("embed_scale"):
                continue  # a constant, which no checkpoint has
            if ("norm" in name and name.endswith("weight")) or is_factor(name):
                values.copy_(around_one(name, case.family) + 0.2 * torch.randn_like(values))
            elif values.ndim < 2 and "inv_freq" not in name:
                values.copy_(0.2 * torch.randn_like(values))
            elif values.ndim >= 2 and values.is_floating_point():
                values.copy_(torch.randn_like(values) * 1.5 / values.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    if case.family == FAMILY:
        in_own_format(folder, case.decoder)
        return decoder_of(model)
    if case.family in _AS_PUBLISHED:
        _rewrite(folder, _AS_PUBLISHED[case.family])
    if case.rewrite:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | case.rewrite))
    return decoder_of(model)


def _kimi(tensors: dict[str, Any]) -> dict[str, Any]:
    def moved(name: str) -> str:
        name = name.replace("language_model.model.blocks.", "language_model.model.layers.")
        return name.removeprefix("model.") if "mm_projector" in name else name

    return {moved(name): values for name, values in tensors.items()}


def _qwen_vl(tensors: dict[str, Any]) -> dict[str, Any]:
    together = ("experts.gate_up_proj", "experts.down_proj")
    return {n: v.transpose(1, 2).contiguous() if n.endswith(together) else v for n, v in tensors.items()}


def _qwen3_5(tensors: dict[str, Any]) -> dict[str, Any]:
    """The experts of a layer as two tensors, gates above ups."""
    import torch

    found = {name: values for name, values in tensors.items() if ".mlp.experts." not in name}
    single = ".mlp.experts.0.gate_proj.weight"
    for layer in [name.removesuffix(single) for name in tensors if name.endswith(single)]:
        count = sum(name.startswith(f"{layer}.mlp.experts.") for name in tensors) // 3
        gate, up, down = (
            torch.stack([tensors[f"{layer}.mlp.experts.{e}.{part}_proj.weight"] for e in range(count)])
            for part in ("gate", "up", "down")
        )
        found[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{layer}.mlp.experts.down_proj"] = down
    return found


def _kimi_linear(tensors: dict[str, Any]) -> dict[str, Any]:
    def moved(name: str) -> str:
        dense = name.split(".block_sparse_moe.")[-1].startswith(("gate_proj", "up_proj", "down_proj"))
        return name.replace(".block_sparse_moe.", ".mlp.") if dense else name

    return {moved(name): values for name, values in tensors.items()}


_AS_PUBLISHED = {"kimi_linear": _kimi_linear, "kimi_k25": _kimi, "qwen3_vl_moe": _qwen_vl, "qwen3_5_moe": _qwen3_5}
"""From how transformers 5.24 writes names and values of these families to how they are published."""


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file, {"format": "pt"})


def decoder_of(model: Any) -> Any:
    """The part that answers texts where that is a model of its own (Llama 4), else the whole model."""
    inner = getattr(model, "language_model", None)
    return model if getattr(inner, "lm_head", None) is None else inner


def reference_class(case: Case) -> Any:
    """The class of transformers that makes a model of a case."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Mistral4Config, Mistral4ForCausalLM

    # transformers 5.24 knows the decoder of Mistral 4 by itself, but not as one of its causal models.
    AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)
    return AutoModelForCausalLM if case.beside is None else AutoModelForImageTextToText
