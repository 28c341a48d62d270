"""Writes a Mixtral of random weights in the forms in which models are published, as fast as a disk takes them.

Numbers are random bits in the places of weights, with scales that are small numbers: what is measured with them reads,
widens and multiplies as many bytes as it would of a trained model. Norms, router, embedding and head are bfloat16.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import MODEL_ARCH_NAMES
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from benchmarks.loading import SHARD, config
from moejax.checkpoint.families import array_sources, read_config
from simulation.byte_tokenizer import byte_tokenizer

Shape = tuple[int, ...]
Parts = dict[str, np.ndarray]
GROUP = 128
"""Inputs that share a scale, and outputs too in blocks, but for the forms that fix another number."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def _scales(draw: np.random.Generator, shape: Shape, dtype: Any) -> np.ndarray:
    return draw.uniform(1e-3, 4e-3, shape).astype(dtype)


def _bytes(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return np.frombuffer(draw.bytes(math.prod(shape)), np.uint8).reshape(shape)


def _words(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return _bytes(draw, rows, 4 * columns).view(np.int32)


def _fp8(draw: np.random.Generator, out: int, inputs: int) -> np.ndarray:
    return (_bytes(draw, out, inputs) & np.uint8(0xBF)).view(ml_dtypes.float8_e4m3fn)  # below 2, never NaN


def _bfloat16(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    bits = _bytes(draw, out, 2 * inputs).view(np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)
    return {"weight": bits.view(BFLOAT16)}


def _fp8_block(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    blocks = (-(-out // GROUP), -(-inputs // GROUP))
    return {"weight": _fp8(draw, out, inputs), "weight_scale_inv": _scales(draw, blocks, np.float32)}


def _fp8_tensor(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    return {"weight": _fp8(draw, out, inputs), "weight_scale": _scales(draw, (), np.float32)}


def _mxfp8(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    return {"weight": _fp8(draw, out, inputs), "weight_scale": draw.integers(116, 120, (out, inputs // 32), np.uint8)}


def _int8(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    return {"weight": _bytes(draw, out, inputs).view(np.int8), "weight_scale": _scales(draw, (out, 1), BFLOAT16)}


def _mxfp4(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    exponents = draw.integers(116, 120, (out, inputs // 32), np.uint8)
    return {"weight_packed": _bytes(draw, out, inputs // 2), "weight_scale": exponents}


def _nvfp4(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    scale = draw.uniform(8, 64, (out, inputs // 16)).astype(ml_dtypes.float8_e4m3fn)
    whole = np.array(1e-4, np.float32)
    return {"weight": _bytes(draw, out, inputs // 2), "weight_scale": scale, "weight_scale_2": whole}


def _int4(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    shape = np.array([out, inputs], np.int64)
    scale = _scales(draw, (out, inputs // 32), BFLOAT16)
    return {"weight_packed": _words(draw, out, inputs // 8), "weight_scale": scale, "weight_shape": shape}


def _awq(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    groups = inputs // GROUP
    zeros, scale = _words(draw, groups, out // 8), _scales(draw, (groups, out), np.float16)
    return {"qweight": _words(draw, inputs, out // 8), "qzeros": zeros, "scales": scale}


def _gptq(draw: np.random.Generator, out: int, inputs: int) -> Parts:
    groups = np.arange(inputs, dtype=np.int32) // GROUP
    return _awq(draw, out, inputs) | {"qweight": _words(draw, inputs // 8, out), "g_idx": groups}


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


Written = tuple[Mapping[str, Any] | None, Callable[[np.random.Generator, int, int], Parts]]
FORMS: dict[str, Written] = {
    "bfloat16": (None, _bfloat16),
    "fp8 block": ({"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, _fp8_block),
    "fp8 tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, _fp8_tensor),
    "mxfp8": (_compressed("mxfp8-quantized", num_bits=8, type="float", group_size=32), _mxfp8),
    "int8": (_compressed("int-quantized", num_bits=8, type="int", strategy="channel"), _int8),
    "mxfp4": (_compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32), _mxfp4),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, _nvfp4),
    "int4": (_compressed("pack-quantized", num_bits=4, type="int", group_size=32, symmetric=True), _int4),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, _awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}, _gptq),
}
"""The `quantization_config` of each form, and the tensors of a matrix `[out, in]` in it, by the ends of their names."""
GGUF = "gguf q8_0"


def write_form(place: Path, form: str, gib: float) -> int:
    """Write a model of `gib` GiB in bfloat16 in one of FORMS to the folder `place`, or as GGUF to the file `place`.
    Returns the bytes of its weights."""
    values: dict[str, Any] = config(gib) | {"torch_dtype": "bfloat16"}
    if form == GGUF:
        return _write_gguf(place, values)
    quantization, narrow = FORMS[form]
    place.mkdir(parents=True)
    described = values if quantization is None else values | {"quantization_config": quantization}
    (place / "config.json").write_text(json.dumps(described))
    words = {f"w{i}": i for i in range(int(values["vocab_size"]))}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(place / "tokenizer.json"))
    draw, shard, names, total = np.random.default_rng(0), Parts(), dict[str, str](), 0

    def flush() -> None:
        file = f"model-{len(set(names.values())):05d}.safetensors"
        save_file(shard, place / file)
        names.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in _shapes(values).items():
        parts = narrow(draw, *shape) if _is_narrow(name) else _plain(draw, shape)
        shard |= {name.removesuffix("weight") + key: part for key, part in parts.items()}
        total += sum(part.nbytes for part in parts.values())
        if sum(part.nbytes for part in shard.values()) > SHARD:
            flush()
    flush()
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return total


def _shapes(values: Mapping[str, Any]) -> dict[str, Shape]:
    cfg = read_config(values, name="model")
    return {tensor.name: tensor.shape for entry in array_sources(cfg) for tensor in entry.tensors}


def _is_narrow(name: str) -> bool:
    return "_proj." in name or ".experts." in name


def _plain(draw: np.random.Generator, shape: Shape) -> Parts:
    return {"weight": np.ones(shape, BFLOAT16)} if len(shape) == 1 else _bfloat16(draw, shape[0], shape[1])


def _write_gguf(file: Path, values: Mapping[str, Any]) -> int:
    """A file of llama.cpp, its matrices in Q8_0."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_rope_freq_base(values["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(values["num_local_experts"])
    writer.add_expert_used_count(values["num_experts_per_tok"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokenizer = byte_tokenizer().format
    known_words = [*(tokenizer.token(i) or "" for i in range(tokenizer.size)), "th"]
    words = [*known_words, *(f"w{i}" for i in range(len(known_words), values["vocab_size"]))]
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(values["eos_token_id"])
    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == "llama")
    known = gguf.get_tensor_name_map(kind, values["num_hidden_layers"])
    draw, experts, total = np.random.default_rng(0), values["num_local_experts"], 0
    for name, shape in _shapes(values).items():
        if ".experts." in name and ".experts.0." not in name:
            continue  # those of a layer lie together
        whole = (experts, *shape) if ".experts." in name else shape
        place = known.get_name(name.replace(".experts.0.", ".experts."), try_suffixes=(".weight",))
        narrow = _is_narrow(name) or "embed" in name or "lm_head" in name
        assert place is not None, f"{name} has a place"
        numbers = _q8_0(draw, whole) if narrow else draw.standard_normal(whole, np.float32)
        writer.add_tensor(place, numbers, raw_dtype=Q8_0 if narrow else gguf.GGMLQuantizationType.F32)
        total += numbers.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def _q8_0(draw: np.random.Generator, shape: Shape) -> np.ndarray:
    """Blocks of a float16 scale and 32 integers."""
    numbers, size = gguf.GGML_QUANT_SIZES[Q8_0]
    blocks = _bytes(draw, *shape[:-1], shape[-1] // numbers, size).copy()
    blocks[..., :2] = _scales(draw, (*blocks.shape[:-1], 1), np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)
