"""A GGUF file is read as the model that it is: each tensor in its place, widened as the `gguf` package widens it."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import dequantize, quantize

from moejax.checkpoint.families import array_sources, read_config
from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.published import open_published, read_array
from moejax.tools.gguf_folder import PERMUTED, ensure_folder, published_config, write_folder
from moejax.tools.gguf_tokenizer import tokenizer_files
from moejax.tools.resolve import is_gguf
from serving.text.tokenizer import Tokenizer
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
            form = next((form for part, form in TYPES.items() if part in tensor.name), Kind.F32)
            form = Kind.F32 if len(tensor.shape) == 1 else form
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


@pytest.mark.parametrize("family", MODELS)
def test_every_number_is_where_the_family_has_it_as_the_package_widens_it(family: str, tmp_path: Path) -> None:
    published = write_gguf(tmp_path / "m.gguf", family)
    write_folder(tmp_path / "m.gguf", tmp_path / "m")
    cfg, weights = open_published(tmp_path / "m")
    assert cfg == read_config(config_of(family), name="m")
    for entry in array_sources(cfg):
        held = [published[tensor.name] for tensor in entry.tensors]
        held = [part.astype(weights.dtype(t.name)) for part, t in zip(held, entry.tensors, strict=True)]
        np.testing.assert_array_equal(read_array(entry, weights, np.dtype(np.float32)), entry.array(held))
    assert {weights.form(name) for name in weights.names()} == {"float32", "float16"}
    tokenizer = Tokenizer.load(tmp_path / "m")
    assert tokenizer.decode(tokenizer.encode("the quick the")) == "the quick the"
    assert tokenizer.encode("the")[0] == len(vocabulary()) - 1
    assert (tmp_path / "m/chat_template.jinja").read_text() == "{{ messages[0].content }}"


def edited(path: Path, **changes: Any) -> None:
    """A GGUF file with nothing but these fields."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    for name, value in changes.items():
        writer.add_string(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_is_not_read_is_refused_by_name_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    edited(file, architecture="mamba2")
    with pytest.raises(CheckpointError, match=r"architecture is 'mamba2'; from GGUF are read llama, .*Give the folder"):
        write_folder(file, tmp_path / "m")
    edited(file)
    with pytest.raises(CheckpointError, match=r"m\.gguf lacks 'llama\."):
        write_folder(file, tmp_path / "m")
    write_gguf(file, "olmoe")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_folder(file, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def llama_fields(**tokenizer: Any) -> dict[str, Any]:
    """Fields of a small model of the architecture `llama`."""
    sizes = {"embedding_length": 64, "block_count": 1, "feed_forward_length": 64, "context_length": 64}
    attention = {"attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    fields = {f"llama.{name}": value for name, value in (sizes | attention).items()}
    vocabulary = {"tokens": ["<unk>", "<s>", "</s>", "a", "<eot>"], "token_type": [2, 3, 3, 1, 3], "scores": [0.0] * 5}
    named = {f"tokenizer.ggml.{name}": value for name, value in (vocabulary | {"merges": []} | tokenizer).items()}
    return fields | named | {"general.architecture": "llama"}


def config_of_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return published_config(fields, {"token_embd.weight": np.zeros((64, 5))})


@pytest.mark.parametrize(
    ("kind", "stated", "begins"),
    [
        ("llama/default", {}, True),
        ("llama/default", {"add_bos_token": False}, False),
        ("gpt2/llama-bpe", {"bos_token_id": 1}, True),
        ("gpt2/llama-bpe", {"bos_token_id": 1, "add_bos_token": False}, False),
        ("gpt2/qwen2", {"bos_token_id": 1}, None),
        ("gpt2/qwen2", {"bos_token_id": 1, "add_bos_token": True}, True),
    ],
)
def test_texts_begin_as_in_llama_cpp_where_the_file_says_nothing(kind, stated, begins, tmp_path) -> None:
    model, pre = kind.split("/")
    fields = llama_fields(model=model, pre=pre, **stated)
    for name, content in tokenizer_files(fields).items():
        (tmp_path / name).write_bytes(content)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("add_bos_token") == begins
    assert config_of_fields(fields).get("bos_token_id") == (1 if begins else None)
    if model == "gpt2":
        assert Tokenizer.load(tmp_path).encode("a") == ((1, 3) if begins else (3,))


def test_every_token_that_ends_a_turn_is_a_stop_token() -> None:
    assert config_of_fields(llama_fields(model="llama"))["eos_token_id"] == [2]
    fields = llama_fields(model="llama", eos_token_id=2, eot_token_id=4, eom_token_id=2)
    assert config_of_fields(fields)["eos_token_id"] == [2, 4]


def test_rotary_embeddings_are_scaled_as_llama_cpp_does() -> None:
    fields = llama_fields(model="llama")
    assert "rope_scaling" not in config_of_fields(fields)
    for named in ({"rope.scale_linear": 4.0}, {"rope.scaling.factor": 4.0}):
        found = config_of_fields(fields | {f"llama.{name}": value for name, value in named.items()})
        assert found["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(ValueError, match=r"rope\.scaling\.attn_factor is 0\.5; read is 1\.0"):
        config_of_fields(fields | {"llama.rope.scaling.attn_factor": 0.5})


def test_a_folder_is_made_again_for_another_tokenizer_beside_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", "olmoe")
    first = ensure_folder(tmp_path / "m.gguf")
    inner = byte_tokenizer().format.inner
    inner.add_tokens(["th", "the"])
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    second = ensure_folder(tmp_path / "m.gguf")
    assert second == ensure_folder(tmp_path / "m.gguf") != first
    assert (second / "tokenizer.json").read_text() == inner.to_str()


def test_a_tokenizer_that_is_not_known_is_taken_from_beside_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "olmoe")
    text = (tmp_path / "m.gguf").read_bytes()
    assert text.count(b"\x05\x00\x00\x00\x00\x00\x00\x00gpt-2") == 1
    (tmp_path / "m.gguf").write_bytes(
        text.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00gpt-2", b"\x05\x00\x00\x00\x00\x00\x00\x00other")
    )
    with pytest.raises(CheckpointError, match=r"tokenizer is gpt2/other; .*tokenizer.json beside the file"):
        write_folder(tmp_path / "m.gguf", tmp_path / "m")
    inner = byte_tokenizer().format.inner
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    sizes = f"has {len(vocabulary())} tokens, and .* has {len(vocabulary()) - 2}"
    with pytest.raises(CheckpointError, match=sizes):
        write_folder(tmp_path / "m.gguf", tmp_path / "m")
    inner.add_tokens(["th", "the"])
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    write_folder(tmp_path / "m.gguf", tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "olmoe"
    assert "add_bos_token" not in json.loads((tmp_path / "m/tokenizer_config.json").read_text()), "it says so itself"
    assert is_gguf(tmp_path / "m.gguf")
    assert not is_gguf(tmp_path / "tokenizer.json")
