"""Small GGUF files of random numbers: matrices in every type that models are published in."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import dequantize, quantize

from moejax.checkpoint.families import array_sources, read_config
from moejax.tools.gguf_folder import PERMUTED
from simulation.byte_tokenizer import byte_tokenizer

Kind = gguf.GGMLQuantizationType
TYPES = {
    "q_proj": Kind.Q4_K,
    "k_proj": Kind.Q6_K,
    "v_proj": Kind.BF16,
    "o_proj": Kind.F16,
    "embed": Kind.Q8_0,
    "lm_head": Kind.Q6_K,
    "gate_proj": Kind.Q4_0,
    "w1": Kind.Q4_K,
    "down_proj": Kind.Q8_0,
    "w2": Kind.Q6_K,
    "up_proj": Kind.Q4_K,
    "w3": Kind.Q4_0,
}
"""The type of each matrix, by a part of its published name; all others are float32."""
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama": ("llama", {"attention_bias": False}),
    "olmoe": ("olmoe", EXPERTS | {"norm_topk_prob": False}),
    "qwen2_moe": ("qwen2moe", EXPERTS | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512}),
    "qwen3_moe": ("qwen3moe", EXPERTS | {"moe_intermediate_size": 256, "norm_topk_prob": True}),
}
"""The architecture in GGUF of each family, and the fields of its config.json."""


def config_of(family: str) -> dict[str, Any]:
    return SIZES | MODELS[family][1] | {"model_type": family, "vocab_size": len(vocabulary())}


def vocabulary() -> list[str]:
    inner = byte_tokenizer().format.inner
    return [*(inner.id_to_token(i) for i in range(inner.get_vocab_size())), "th", "the"]


def type_of(name: str, axes: int) -> Kind:
    """The type of a tensor with so many axes, by its published name."""
    return next((form for part, form in TYPES.items() if part in name and axes > 1), Kind.F32)


def raw(draw: np.random.Generator, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Numbers of a tensor as GGUF stores them. The package cannot quantise to Q4_K and Q6_K: those are any bits, with
    scales that are small numbers."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return quantize(draw.standard_normal(shape, np.float32), kind)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = draw.integers(0, 256, (*shape[:-1], shape[-1] // numbers, size), dtype=np.uint8)
    scales = (draw.uniform(0.001, 0.01, (*blocks.shape[:-1], 2))).astype(np.float16).view(np.uint8)
    if kind is Kind.Q4_K:
        blocks[..., :4] = scales
    else:
        blocks[..., -2:] = scales[..., :2]
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(path: Path, family: str) -> dict[str, np.ndarray]:
    """A GGUF file of random numbers; returns its tensors by their published names, widened."""
    config, (architecture, own) = config_of(family), MODELS[family]
    cfg, draw = read_config(config, name=family), np.random.default_rng(5)
    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names, writer = gguf.get_tensor_name_map(kind, 2), gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(2)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if cfg.moe:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(256)
    if "shared_expert_intermediate_size" in own:
        writer.add_expert_shared_feed_forward_length(512)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] + [1] * (len(vocabulary()) - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    published: dict[str, np.ndarray] = {}
    together: dict[str, list[tuple[np.ndarray, Kind]]] = {}
    for entry in array_sources(cfg):
        for tensor in entry.tensors:
            form = type_of(tensor.name, len(tensor.shape))
            held = raw(draw, tensor.shape, form)
            rows = np.arange(tensor.shape[0])
            if (found := PERMUTED.search(tensor.name)) and architecture == "llama":
                heads = 4 if found[1] == "q" else 2
                rows = rows.reshape(heads, 2, 32).swapaxes(1, 2).reshape(-1)
            published[tensor.name] = dequantize(held, form)
            place = names.get_name(
                re.sub(r"\.experts\.\d+\.", ".experts.", tensor.name), try_suffixes=(".weight", ".bias")
            )
            together.setdefault(place, []).append((held[rows], form))
    for place, parts in together.items():
        values = np.stack([held for held, _ in parts]) if "_exps." in place else parts[0][0]
        writer.add_tensor(place, values, raw_dtype=parts[0][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return published
