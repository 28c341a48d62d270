"""Folders as transformers writes them, in Mistral's own format: `params.json` and `consolidated*.safetensors`."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from planner.inputs.published.mistral_format import FAMILY, FILE

_NAMES = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    "model.layers.": "layers.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.q_a_layernorm.": ".attention.q_a_norm.",
    ".self_attn.kv_a_layernorm.": ".attention.kv_a_norm.",
    ".self_attn.q_a_proj.": ".attention.wq_a.",
    ".self_attn.q_b_proj.": ".attention.wq_b.",
    ".self_attn.kv_a_proj_with_mqa.": ".attention.wkv_a_with_mqa.",
    ".self_attn.kv_b_proj.": ".attention.wkv_b.",
    ".self_attn.q_proj.": ".attention.wq.",
    ".self_attn.k_proj.": ".attention.wk.",
    ".self_attn.v_proj.": ".attention.wv.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate.": ".gate.",
    ".mlp.shared_experts.": ".shared_experts.",
    ".mlp.experts.": ".experts.",
    ".block_sparse_moe.": ".feed_forward.",
    ".mlp.": ".feed_forward.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
}
"""The parts that take the place of each part of a name, in this order."""


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The params.json of a decoder's configuration in transformers, which must give all that its class decides."""
    rope = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta")}
    found = {
        "dim": values["hidden_size"],
        "n_layers": values["num_hidden_layers"],
        "n_heads": values["num_attention_heads"],
        "n_kv_heads": values["num_key_value_heads"],
        "hidden_dim": values["intermediate_size"],
        "vocab_size": values["vocab_size"],
        "norm_eps": values["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "max_position_embeddings": values["max_position_embeddings"],
        "tied_embeddings": values.get("tie_word_embeddings", False),
        "sliding_window": values.get("sliding_window"),
    }
    alike = ("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    found |= {key: values[key] for key in alike if key in values}
    if rope.get("rope_type") == "yarn":
        original = rope["original_max_position_embeddings"]
        found["yarn"] = {
            "original_max_position_embeddings": original,
            "factor": rope["factor"],
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
            "apply_scale": "attention_factor" not in rope,
        }
        if beta := rope.get("llama_4_scaling_beta"):
            found["llama_4_scaling"] = {"original_max_position_embeddings": original, "beta": beta}
    if "n_routed_experts" in values:
        found["moe"] = {
            "num_experts": values["n_routed_experts"],
            "num_experts_per_tok": values["num_experts_per_tok"],
            "expert_hidden_dim": values["moe_intermediate_size"],
            "num_shared_experts": values["n_shared_experts"],
            "first_k_dense_replace": values["first_k_dense_replace"],
            "routed_scale": values["routed_scaling_factor"],
            "route_every_n": 1,
            "num_expert_groups": 1,
            "num_expert_groups_per_tok": 1,
            "expert_parallel": 1,
            "expert_model_parallel": 1,
        }
    elif "num_local_experts" in values:
        found["moe"] = {key: values[f"num_{name}"] for key, name in _FEW.items()}
    return found


_FEW = {"num_experts": "local_experts", "num_experts_per_tok": "experts_per_tok"}
"""The fields of Mixtral's experts, by their names in transformers."""


def in_own_format(folder: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rewrite a folder of transformers, whose decoder has this configuration; its tensors are returned."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    own = {name: array for each in tensors.items() for name, array in _own_tensors(*each, values)}
    for file in (*folder.glob("*.safetensors*"), folder / "config.json"):
        file.unlink()
    (folder / FILE).write_text(json.dumps(own_values(values)))
    places = {}
    for i in range(2):
        file = f"consolidated-{i + 1:05d}-of-00002.safetensors"
        part = dict(list(own.items())[i::2])
        save_file({name: np.ascontiguousarray(array) for name, array in part.items()}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return own


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the file that describes a model: params.json in this format, else config.json."""
    file = FILE if values["model_type"] == FAMILY else "config.json"
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if file != FILE or k != "model_type"}))


def _own_tensors(name: str, array: np.ndarray, values: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    if fused := re.fullmatch(r"(.*\.experts\.)(gate_up_proj|down_proj)", name):
        for expert, matrix in enumerate(array):
            parts = ("w2",) if fused[2] == "down_proj" else ("w1", "w3")
            for part, each in zip(parts, np.split(matrix, len(parts)), strict=True):
                yield f"{_own_name(fused[1])}{expert}.{part}.weight", each
        return
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    yield _own_name(name), array if heads is None else _in_pairs(array, values[heads])


def _own_name(name: str) -> str:
    for part, own in _NAMES.items():
        name = own + name.removeprefix(part) if name.startswith(part) else name.replace(part, own)
    return name


def _in_pairs(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads whose rotated numbers lie in halves, with these in pairs."""
    return matrix.reshape(heads, 2, -1, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)
