"""Laws of conversion: the same numbers, a chunk per expert, nothing twice, every contradiction named beforehand."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from moejax.checkpoint import convert as converting
from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.convert import JOURNAL, convert, main
from moejax.checkpoint.families import array_sources, read_config
from moejax.checkpoint.host_store import HostStore
from moejax.checkpoint.manifest import CheckpointError, Manifest
from moejax.checkpoint.published import published_name
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.params import named_tensors
from moejax.tools import resolve
from moejax.tools.resolve import ensure_model
from tests.support.published import MIXTRAL, published_folder, write_shards


def quiet(done: int, total: int) -> None:
    pass


def expected_leaf(cfg: ModelConfig, tensors: dict[str, np.ndarray], path: str, leaf: np.ndarray) -> np.ndarray:
    """A leaf put together array by array from the published tensors."""
    out = np.full(leaf.shape, np.nan, np.float32)
    for entry in array_sources(cfg):
        if entry.path == path:
            parts = [tensors[t.name] if t.index is None else tensors[t.name][t.index] for t in entry.tensors]
            out[tuple(i for i in (entry.repeat, entry.expert) if i is not None)] = entry.array(parts)
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name)
def test_numbers_are_those_of_the_published_tensors(tmp_path, dtype, shards):
    tensors = published_folder(tmp_path / "hf", dtype=dtype, shards=shards)
    cfg = convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    assert ModelConfig.load(tmp_path / "out") == cfg == read_config(tmp_path / "hf")
    for path, leaf in named_tensors(load_params(tmp_path / "out")).items():
        np.testing.assert_array_equal(leaf, expected_leaf(cfg, tensors, path, leaf), err_msg=path)
    stored = Manifest.load(tmp_path / "out").tensors
    assert {t.dtype for n, t in stored.items() if not n.endswith("moe.bias")} == {np.dtype(dtype).name}


def test_orbax_reads_it_without_options(tmp_path):
    published_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    read = ocp.load(str(tmp_path / "out" / "params"))
    ours = load_params(tmp_path / "out")
    assert len(jax.tree.leaves(read)) == len(jax.tree.leaves(ours))
    np.testing.assert_array_equal(read["embed"], ours.embed)
    np.testing.assert_array_equal(
        read["segments"][0][0]["moe"]["experts"]["down"], ours.segments[0][0].moe.experts.down
    )


def test_an_expert_and_a_layers_part_are_files_of_their_own(tmp_path):
    published_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    state = tmp_path / "out" / "params" / "state"
    down = sorted(state.glob("segments.0.0.moe.experts.down/c/*/*/0/0"))
    assert [f.stat().st_size for f in down] == [4 * 32 * 48] * 12
    assert [f.stat().st_size for f in sorted(state.glob("segments.0.0.qkv/c/*/0/0"))] == [4 * 64 * 32] * 3


def test_the_host_store_reads_what_was_converted(tmp_path):
    tensors = published_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    store = HostStore.open(tmp_path / "out")
    gate_up, down = store.read_experts([(2, 3)])[2, 3]
    block = "model.layers.2.block_sparse_moe.experts.3."
    np.testing.assert_array_equal(down, tensors[f"{block}w2.weight"].astype(np.float32))
    np.testing.assert_array_equal(
        gate_up, np.concatenate([tensors[f"{block}w1.weight"], tensors[f"{block}w3.weight"]]).astype(np.float32)
    )
    whole, rest = load_params(tmp_path / "out"), store.non_expert_params()
    np.testing.assert_array_equal(rest.segments[0][0].qkv, whole.segments[0][0].qkv)


def test_weights_are_stored_as_asked(tmp_path):
    tensors = published_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16", name="small", on_progress=quiet)
    assert {t.dtype for t in Manifest.load(tmp_path / "out").tensors.values()} == {"bfloat16"}
    assert ModelConfig.load(tmp_path / "out").name == "small"
    rounded = tensors["lm_head.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(load_params(tmp_path / "out").head, rounded)
    with pytest.raises(CheckpointError, match="dtype is 'int4'; known are float32, bfloat16, float16"):
        convert(tmp_path / "hf", tmp_path / "out", dtype="int4", on_progress=quiet)


def test_float8_weights_are_widened(tmp_path):
    tensors = published_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    name = "model.layers.0.self_attn.o_proj.weight"
    scale = np.full((1, 1), 0.5, np.float32)
    write_shards(
        tmp_path / "hf",
        tensors | {name: tensors[name].astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": scale},
        2,
    )
    convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    wide = tensors[name].astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / 2
    np.testing.assert_array_equal(load_params(tmp_path / "out").segments[0][0].out[0], wide)


def test_the_tokenizer_and_its_settings_come_along(tmp_path):
    published_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: none of tokenizer\.json, "):
        convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from moejax.checkpoint import convert as converting
converting.IN_FLIGHT = 0
def on_progress(done, total):
    if done > float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)
converting.convert(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=on_progress)
"""


def killed_conversion(source, target, share: float) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED_AT, source, target, str(share)], timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL


def test_a_killed_conversion_is_taken_up_where_it_was(tmp_path, monkeypatch):
    tensors = published_folder(tmp_path / "hf")
    source, target = tmp_path / "hf", tmp_path / "out"
    killed_conversion(source, target, 0.5)
    assert not target.exists()
    journal = tmp_path / ".out.converting" / JOURNAL
    written = journal.read_text().count("\n") - 1
    with journal.open("a") as file:
        file.write('["cut sho')  # as a kill may leave it
    read: list[str] = []
    array = converting.read_array

    def counted(entry, *rest):
        read.append(converting.array_key(entry))
        return array(entry, *rest)

    monkeypatch.setattr(converting, "read_array", counted)
    cfg = convert(source, target, on_progress=quiet)
    entries = len(list(array_sources(cfg)))
    assert len(read) == len(set(read)) == entries - written
    assert 0 < len(read) < entries
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["hf", "out"]
    for path, leaf in named_tensors(load_params(target)).items():
        np.testing.assert_array_equal(leaf, expected_leaf(cfg, tensors, path, leaf))


def test_a_draft_of_other_weights_is_thrown_away(tmp_path):
    published_folder(tmp_path / "hf")
    killed_conversion(tmp_path / "hf", tmp_path / "out", 0.9)
    tensors = published_folder(tmp_path / "hf", seed=1)
    for file in (tmp_path / "hf").iterdir():  # written later, also on a file system with a coarse clock
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    cfg = convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    for path, leaf in named_tensors(load_params(tmp_path / "out")).items():
        np.testing.assert_array_equal(leaf, expected_leaf(cfg, tensors, path, leaf))


def test_a_chunk_that_a_power_cut_took_back_is_written_again(tmp_path):
    tensors = published_folder(tmp_path / "hf")
    killed_conversion(tmp_path / "hf", tmp_path / "out", 0.9)
    (chunk, *_) = sorted((tmp_path / ".out.converting" / "params" / "state").glob("*.qkv/c/0/0/0"))
    chunk.write_bytes(b"")
    cfg = convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    leaf = load_params(tmp_path / "out").segments[0][0].qkv
    np.testing.assert_array_equal(leaf, expected_leaf(cfg, tensors, "segments.0.0.qkv", leaf))


def drop(folder, tensors):
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    write_shards(folder, tensors, 2)


def cut(folder, tensors):
    (file, *_) = sorted(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def reshape(folder, tensors):
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    write_shards(folder, tensors | {name: np.ascontiguousarray(tensors[name].T)}, 1)


def other_config(key, value):
    def change(folder, tensors):
        (folder / "config.json").write_text(json.dumps(MIXTRAL | {key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (drop, CheckpointError, r"tensor model\.layers\.1\.self_attn\.k_proj\.weight of shape \(16, 32\) is missing"),
        (cut, CheckpointError, r"model-00001-of-00002\.safetensors is no whole safetensors file"),
        (
            reshape,
            CheckpointError,
            r"model\.safetensors: tensor .*experts\.3\.w2\.weight has shape \(48, 32\), but .* says \(32, 48\)",
        ),
        (
            other_config("intermediate_size", 64),
            CheckpointError,
            r"experts\.0\.w1\.weight has shape \(48, 32\), but config\.json says \(64, 32\)",
        ),
        (
            other_config("num_hidden_layers", 2),
            CheckpointError,
            r"tensor model\.layers\.2\..* has no place in the model that config\.json describes \(mixtral, 2 layers\)",
        ),
        (other_config("num_local_experts", 8), CheckpointError, r"gate\.weight has shape \(4, 32\).* says \(8, 32\)"),
        (other_config("model_type", "gpt2"), ConfigError, r"model_type is 'gpt2'.* which is not served"),
    ],
    ids=["missing", "cut", "shape", "width", "layers", "experts", "architecture"],
)
def test_contradictions_are_named_before_anything_is_written(tmp_path, damage, kind, says):
    tensors = published_folder(tmp_path / "hf")
    damage(tmp_path / "hf", tensors)
    with pytest.raises(kind, match=says):
        convert(tmp_path / "hf", tmp_path / "out" / "model", on_progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_published_folder_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    published_folder(tmp_path / "hf")
    folder = ensure_model(tmp_path / "hf")
    assert folder.parent == tmp_path / "cache" / "models"
    assert folder.name.startswith("hf-")
    monkeypatch.setattr(resolve, "convert", None)
    assert ensure_model(str(tmp_path / "hf")) == folder
    monkeypatch.undo()
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    published_folder(tmp_path / "hf", seed=1)
    assert ensure_model(tmp_path / "hf") != folder


def test_a_folder_of_the_hub_has_the_name_of_its_repository(tmp_path):
    folder = tmp_path / "models--mistralai--Mixtral-8x7B" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    assert published_name(folder) == "Mixtral-8x7B"
    assert published_name(tmp_path) == tmp_path.name


def test_without_room_nothing_is_begun(tmp_path, monkeypatch):
    published_folder(tmp_path / "hf")
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"has 0 MiB free; the weights of hf need \d+ MiB"):
        convert(tmp_path / "hf", tmp_path / "out", on_progress=quiet)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    published_folder(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert "moejax serve --model" in capsys.readouterr().out
    (tmp_path / "hf" / "config.json").unlink()
    assert main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip().split("\n")[-1].startswith("moejax: ")
