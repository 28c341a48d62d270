"""A GGUF file is read as the model that it is: each tensor in its place, widened as the `gguf` package widens it."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from moejax.checkpoint.families import array_sources, read_config
from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.published import open_published, read_array
from moejax.tools.gguf_folder import ensure_folder, published_config, write_folder
from moejax.tools.gguf_tokenizer import tokenizer_files
from moejax.tools.resolve import is_gguf
from serving.text.tokenizer import Tokenizer
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.gguf_files import MODELS, config_of, vocabulary, write_gguf


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
