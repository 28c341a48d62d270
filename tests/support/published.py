"""Small random models in published form: config.json, safetensors, tokenizer."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moejax.checkpoint.families import array_sources, read_config
from moejax.config.model_config import ModelConfig
from simulation.byte_tokenizer import byte_tokenizer

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def published_folder(
    folder: Path, values: dict[str, Any] = MIXTRAL, *, dtype: Any = np.float32, shards: int = 2, seed: int = 0
) -> dict[str, np.ndarray]:
    """Write a folder; its tensors are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(byte_tokenizer().format.inner.to_str())
    settings = {"bos_token": "<|end|>", "eos_token": "<|stop|>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tensors = random_tensors(read_config(folder), dtype, seed)
    write_shards(folder, tensors, shards)
    return tensors


def random_tensors(cfg: ModelConfig, dtype: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a model by its published name, large enough that routing and attention matter."""
    draw = np.random.default_rng(seed)
    shapes = {t.name: t.shape for entry in array_sources(cfg) for t in entry.tensors}
    return {
        name: (draw.normal(size=shape) / math.sqrt(shape[-1]) * (3 if len(shape) > 1 else 1)).astype(dtype)
        if "norm" not in name and not is_factor(name)
        else (around_one(name, cfg.family) + 0.2 * draw.normal(size=shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def is_factor(name: str) -> bool:
    """True for numbers, beside the scales of norms, that multiply others and are 1 before a training."""
    return name.endswith(("layer_scalar", "router.scale", "router.per_expert_scale"))


def around_one(name: str, family: str) -> float:
    """The published value of a norm whose scale is 1: some families publish most of theirs less 1."""
    less_one = ("qwen3_next", "qwen3_5_moe", "qwen3_5", "step3p5", "step3p7")
    return 0.0 if family in less_one and "linear_attn" not in name else 1.0


def write_shards(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """One file, or several with an index."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, size = {}, sum(array.nbytes for array in tensors.values())
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file, {"format": "pt"})
        names |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": names})
    )
