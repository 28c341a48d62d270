"""A GGUF file (llama.cpp) as a published folder: config.json, safetensors and a tokenizer, which are then read as any.

Tensors get the names of `transformers`, by the map of the `gguf` package itself, and the shapes that the model's
family has there: the experts of a layer lie together in GGUF and become tensors of their own, and rows of queries and
keys that llama.cpp permutes, so that neighbours rotate against each other, are put back. Quantised numbers (Q4_0,
Q8_0, Q4_K, Q6_K and the other types that the package can widen) become float16, the format of their scales; float32,
float16 and bfloat16 stay as they are.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import dequantize

from moejax.checkpoint.convert import ProgressCallback, progress
from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.families import array_sources, read_config
from moejax.checkpoint.families.source import SourceTensor
from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.model_folder import exclusive
from moejax.tools.gguf_tokenizer import TokenizerFiles, begins_texts, special_token, tokenizer_files

FORM = 2
"""Part of the name of folders that are made here. Raise it when they change, so that they are made again."""
PERMUTED = re.compile(r"\.self_attn\.([qk])_proj\.")
"""Tensors of Llama's architecture whose rows llama.cpp permutes."""
KEPT = {"F32": ("F32", np.dtype(np.float32)), "F16": ("F16", np.dtype(np.float16))} | {
    "BF16": ("BF16", np.dtype(ml_dtypes.bfloat16))
}
"""Types of GGUF that stay as they are, by their names in safetensors."""
ROPE_CONSTANTS = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
"""Fields of scaled rotary embeddings that are read with this value alone."""
NOT_READ = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

Fields = Mapping[str, Any]


def ensure_folder(file: Path) -> Path:
    """The published folder of a GGUF file, from the cache or made there; made again when the file changes, or the
    tokenizer.json beside it. Raises CheckpointError for a file that is cut short or of an architecture, a tokenizer or
    parts that are not read."""
    made_of = [each.stat() for each in (file, file.parent / "tokenizer.json") if each.is_file()]
    stamps = "-".join(f"{state.st_size:x}-{state.st_mtime_ns:x}" for state in made_of)
    name = f"{file.stem}-gguf-{stamps}-{FORM}"
    folder = cache_folder() / "models" / name / file.stem
    with exclusive(folder.parent):
        if not folder.is_dir():
            draft = folder.parent.with_name(f".{name}-draft")
            shutil.rmtree(draft, ignore_errors=True)
            with progress(f"Reading {file.name}, once") as on_progress:
                write_folder(file, draft / file.stem, on_progress)
            shutil.rmtree(folder.parent, ignore_errors=True)
            draft.rename(folder.parent)
    return folder


def write_folder(file: Path, folder: Path, on_progress: ProgressCallback = lambda done, total: None) -> None:
    """Write the model of a GGUF file as a published folder. Memory is that of one tensor. Raises CheckpointError."""
    try:
        reader = gguf.GGUFReader(file)
        fields = {field.name: field.contents() for field in reader.fields.values()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        config = published_config(fields, stored)
        files = tokenizer_files(fields, beside=file.parent)
    except (KeyError, ValueError, OSError, IndexError) as error:
        cause = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise CheckpointError(f"{file} {cause}") from error
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(folder, files)
    wanted = list(_wanted(folder, fields["general.architecture"]))
    lacking = [place for place, _ in wanted if place not in stored]
    if lacking:
        raise CheckpointError(f"{file} lacks tensor {lacking[0]}, which a {config['model_type']} model has.")
    spare = sorted(stored.keys() - {place for place, _ in wanted})
    if spare:
        raise CheckpointError(f"{file} has tensor {spare[0]}, which has no place in a {config['model_type']} model.")
    permuted = config["num_attention_heads"], config["num_key_value_heads"]
    heads = dict(zip("qk", permuted, strict=True)) if fields["general.architecture"] == "llama" else {}
    _write_tensors(folder / "model.safetensors", wanted, stored, heads, on_progress)


def published_config(fields: Fields, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model, from the fields of its GGUF file and the names of its tensors. Raises ValueError for
    an architecture or a part that is not read, KeyError for a field that is missing."""
    kind = fields["general.architecture"]
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"its architecture is {kind!r}; from GGUF are read {', '.join(sorted(ARCHITECTURES))}. Give the folder "
            "of the same model as it was published (config.json and safetensors)."
        )
    if refused := [name for name in NOT_READ if name in stored]:
        raise ValueError(f"it has {refused[0]}, factors of rotation by frequency, which are not read from GGUF")

    def of(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if value is None:
            raise KeyError(f"{kind}.{name}")
        return value

    heads = of("attention.head_count")
    config = {
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "hidden_size": of("embedding_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": of("attention.key_length", of("embedding_length") // heads),
        "intermediate_size": of("feed_forward_length"),
        "rms_norm_eps": round(float(of("attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(of("rope.freq_base", 10_000.0)),
        "max_position_embeddings": of("context_length"),
        "tie_word_embeddings": "output.weight" not in stored,
        **_rope_scaling(of),
    }
    stops = [token for name in ("eos", "eot", "eom") if (token := special_token(fields, name)) is not None]
    if stops:
        config["eos_token_id"] = list(dict.fromkeys(stops))
    begin = special_token(fields, "bos")
    if begins_texts(fields) and begin is not None:
        config["bos_token_id"] = begin
    return config | ARCHITECTURES[kind](of, stored)


def _rope_scaling(of: Callable[..., Any]) -> dict[str, Any]:
    """How llama.cpp scales: without a type it is linear, by the factor of either name."""
    kind = of("rope.scaling.type", "linear")
    factor = float(of("rope.scaling.factor", of("rope.scale_linear", 0.0))) or 1.0
    for name, read in ROPE_CONSTANTS.items():
        if (value := float(of(f"rope.scaling.{name}", read))) != read:
            raise ValueError(f"its rope.scaling.{name} is {value}; read is {read}")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind not in ("linear", "yarn"):
        raise ValueError(f"its rotary embedding is scaled by {kind!r}; read are linear and yarn")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = of("rope.scaling.original_context_length")
    return {"rope_scaling": scaling}


def _llama(of: Callable[..., Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Llama, or with experts Mixtral."""
    if not of("expert_count", 0):
        return {"model_type": "llama", "attention_bias": "blk.0.attn_q.bias" in stored}
    chosen = {"num_local_experts": of("expert_count"), "num_experts_per_tok": of("expert_used_count")}
    return {"model_type": "mixtral", "sliding_window": None} | chosen


def _experts(of: Callable[..., Any]) -> dict[str, Any]:
    width = of("expert_feed_forward_length")
    chosen = {"num_experts": of("expert_count"), "num_experts_per_tok": of("expert_used_count")}
    return {"moe_intermediate_size": width} | chosen


def _qwen2_moe(of: Callable[..., Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    shared = of("expert_shared_feed_forward_length")
    biased = "blk.0.attn_q.bias" in stored
    return {"model_type": "qwen2_moe", "shared_expert_intermediate_size": shared, "qkv_bias": biased} | _experts(of)


def _qwen3_moe(of: Callable[..., Any], _: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "qwen3_moe", "norm_topk_prob": True} | _experts(of)


def _olmoe(of: Callable[..., Any], _: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {"num_experts": of("expert_count"), "num_experts_per_tok": of("expert_used_count")}
    return {"model_type": "olmoe", "norm_topk_prob": False} | chosen


ARCHITECTURES: dict[str, Callable[[Callable[..., Any], Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "olmoe": _olmoe,
    "qwen2": lambda of, stored: {"model_type": "qwen2"},
    "qwen2moe": _qwen2_moe,
    "qwen3": lambda of, stored: {"model_type": "qwen3"},
    "qwen3moe": _qwen3_moe,
}
"""The fields that each architecture has beside those of all, by its name in GGUF."""


def _wanted(folder: Path, architecture: str) -> Iterator[tuple[str, SourceTensor]]:
    """Every tensor that the reader of published folders wants, with the name of the GGUF tensor that it is in."""
    cfg = read_config(folder)
    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names, seen = gguf.get_tensor_name_map(kind, cfg.n_layers), set()
    for entry in array_sources(cfg):
        for tensor in entry.tensors:
            if tensor.name in seen:
                continue
            seen.add(tensor.name)
            together = re.sub(r"\.experts\.\d+\.", ".experts.", tensor.name)
            place = names.get_name(together, try_suffixes=(".weight", ".bias"))
            yield place or tensor.name, tensor


def _write_tensors(
    file: Path,
    wanted: list[tuple[str, SourceTensor]],
    stored: Mapping[str, Any],
    heads: Mapping[str, int],
    on_progress: ProgressCallback,
) -> None:
    header, at, kept = {}, 0, _kept_types(stored)
    for place, tensor in wanted:
        name, dtype = kept[place]
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for done, (place, tensor) in enumerate(wanted):
            values = _values(place, stored[place], tensor, heads)
            out.write(values.astype(kept[place][1], copy=False).tobytes())
            on_progress(done + 1, len(wanted))


def _values(place: str, tensor: Any, wanted: SourceTensor, heads: Mapping[str, int]) -> np.ndarray:
    expert = re.search(r"\.experts\.(\d+)\.", wanted.name)
    data = tensor.data if expert is None else tensor.data[int(expert[1])]
    values = np.asarray(dequantize(data, tensor.tensor_type))
    if values.shape != wanted.shape:
        values = values.reshape(wanted.shape) if values.size == np.prod(wanted.shape) else values
    if values.shape != wanted.shape:
        raise CheckpointError(f"tensor {place} has shape {values.shape}, but its fields say {wanted.shape}.")
    if (found := PERMUTED.search(wanted.name)) and heads:
        values = halves(values, heads[found[1]])
    return values


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (or a bias) of each head from (pair, member) order to (member, pair): undoes llama.cpp's permutation."""
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _kept_types(stored: Mapping[str, Any]) -> dict[str, tuple[str, np.dtype]]:
    """The type that each tensor has in safetensors: its name there, and in NumPy. Bfloat16 beside float16 becomes
    float32, which holds both: tensors of both may belong to one matrix of a rank."""
    kept = {place: KEPT.get(tensor.tensor_type.name, KEPT["F16"]) for place, tensor in stored.items()}
    if KEPT["F16"] not in kept.values():
        return kept
    return {place: KEPT["F32"] if each == KEPT["BF16"] else each for place, each in kept.items()}


def _write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
