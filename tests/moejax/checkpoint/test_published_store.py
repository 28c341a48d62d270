"""Laws of a published folder that is read in place: it gives what its conversion would give, reads only the bytes asked
for, and distinguishes missing weights from damaged ones."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax.checkpoint.checksums import ALIGNMENT
from moejax.checkpoint.convert import convert
from moejax.checkpoint.host_store import HostStore, StoreCorrupt, StoreMissing
from moejax.checkpoint.manifest import CheckpointError, expert_position
from moejax.checkpoint.published_store import SOURCE, PublishedStore, open_store, record_checksums
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.eight_bit import EightBit
from moejax.config.int4 import Int4
from moejax.config.params import FeedForward, expert_specs, param_specs
from moejax.config.weight_formats import dequantize, is_scaled, weight_shape
from moejax.runtime.host_weights import to_host_weights
from moejax.tools.resolve import ensure_checksums
from tests.support.families.published import CASES
from tests.support.families.small import small_config, small_folder
from tests.support.published import published_folder, write_shards
from tests.support.quantized_folders import CONFIGS, LARGE, narrow, quantized_folders

EXPERT = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
BUFFER = 4096
"""Files are read in so many bytes at a time at least."""


def quiet(done: int, total: int) -> None:
    pass


def noted(folder: Path) -> PublishedStore:
    record_checksums(folder, folder.parent / "noted", name="model", on_progress=quiet)
    return PublishedStore.open(folder.parent / "noted")


def all_experts(store: HostStore | PublishedStore) -> list[tuple[int, int]]:
    experts = store.cfg.moe.experts if store.cfg.moe else 0
    return [(layer, expert) for layer in range(store.cfg.n_moe_layers) for expert in range(experts)]


def same(ours: PublishedStore, converted: HostStore) -> None:
    assert ours.bytes == converted.bytes
    jax.tree.map(np.testing.assert_array_equal, ours.non_expert_params(), converted.non_expert_params())
    wanted = all_experts(converted)
    there = converted.read_experts(wanted)
    for expert, parts in ours.read_experts(wanted).items():
        for part, expected in zip(parts, there[expert], strict=True):
            np.testing.assert_array_equal(part, expected)
        assert ours.is_intact(expert, *parts)
        assert not ours.is_intact(expert, parts[0] + 1, *parts[1:])
    assert not ours.corrupt_tensors(ours.non_expert_params())


@pytest.mark.parametrize(
    "form", ["int4-32", "nvfp4", "mxfp4", "awq", "fp8-block", "fp8-tensor", "fp8-channel", "fp8-exponents", "int8"]
)
def test_matrices_are_held_as_they_are_published(form, tmp_path):
    plain = quantized_folders(tmp_path / "hf", form, wide=np.float32)
    held = noted(tmp_path / "hf").packed
    assert held is not None
    assert len(held.parts) == 4  # attention and experts, two matrices each
    store = open_store(tmp_path / "noted", held=held)
    convert(plain, tmp_path / "out", name="model", on_progress=quiet)
    there, cfg = HostStore.open(tmp_path / "out"), store.cfg.with_packed(held)
    wanted = all_experts(there)
    numbers, read = there.read_experts(wanted), store.read_experts(wanted)
    for expert in wanted:
        specs = expert_specs(cfg, expert_position(cfg, expert[0])[:2])
        kept = to_host_weights(cfg, specs, FeedForward(*read[expert]))
        for part, name in enumerate(("gate_up", "down")):
            assert isinstance(getattr(kept, name), EightBit if "8" in form else Int4)
            np.testing.assert_array_equal(dequantize(getattr(kept, name)), numbers[expert][part])
    common = jax.tree.map(lambda leaf: np.asarray(dequantize(leaf)), store.non_expert_params(), is_leaf=is_scaled)
    jax.tree.map(np.testing.assert_array_equal, common, there.non_expert_params())
    shapes = jax.tree.map(lambda spec: weight_shape(cfg, spec), param_specs(cfg).segments[0][0].qkv)
    assert jax.tree.structure(shapes) == jax.tree.structure(store.non_expert_params().segments[0][0].qkv)


@pytest.mark.parametrize(("form", "rest"), [("int4-32", []), ("fp8-block", ["key_up"]), ("fp8-channel", [])])
def test_of_latent_attention_all_is_held_but_the_half_that_groups_lie_across(form, rest, tmp_path):
    """Of blocks none do, where heads are as many blocks."""
    sizes = {"hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "moe_intermediate_size": 32, "v_head_dim": 16}
    sizes |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16} if form == "fp8-block" else {}
    values = small_config("deepseek-v3", **sizes, intermediate_size=96)
    stored, wide = {}, {}
    for name, array in published_folder(tmp_path / "hf", values).items():
        parts, wide[name] = narrow(form, array) if "_proj" in name else ({}, array)
        stored |= {name.replace("weight", key): part for key, part in parts.items()} or {name: array}
    published_folder(tmp_path / "plain", values)
    write_shards(tmp_path / "plain", wide, 2)
    write_shards(tmp_path / "hf", stored, 2)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values | {"quantization_config": CONFIGS[form]}))
    held = noted(tmp_path / "hf").packed
    store = open_store(tmp_path / "noted", held=held)
    convert(tmp_path / "plain", tmp_path / "out", name="model", on_progress=quiet)
    common = store.non_expert_params()
    packed = {key for key, leaf in vars(common.segments[0][0].latent).items() if is_scaled(leaf)}
    assert packed == {"query", "query_down", "down", "value_up", *rest}
    numbers = jax.tree.map(lambda leaf: np.asarray(dequantize(leaf), np.float32), common, is_leaf=is_scaled)
    plain = HostStore.open(tmp_path / "out").non_expert_params()
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=2**-8), numbers, plain)


def test_blocks_of_pieces_that_end_within_them_are_held_by_fewer_rows(tmp_path):
    """Keys have 8 rows, which stand between queries and values in one matrix."""
    sizes = LARGE | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    plain = quantized_folders(tmp_path / "hf", "fp8-block", wide=np.float32, sizes=sizes)
    held = noted(tmp_path / "hf").packed
    assert held is not None
    assert (held.rows, held.group, len(held.parts)) == (8, 16, 4)
    store = open_store(tmp_path / "noted", held=held)
    convert(plain, tmp_path / "out", name="model", on_progress=quiet)
    numbers = jax.tree.map(lambda leaf: np.asarray(dequantize(leaf)), store.non_expert_params(), is_leaf=is_scaled)
    plainly = HostStore.open(tmp_path / "out").non_expert_params()
    jax.tree.map(np.testing.assert_array_equal, numbers, plainly)


def test_a_packed_expert_that_is_damaged_is_not_taken(tmp_path):
    quantized_folders(tmp_path / "hf", "mxfp4")
    held = noted(tmp_path / "hf").packed
    store = open_store(tmp_path / "noted", held=held)
    name = EXPERT.replace("weight", "weight_packed")
    file = next(f for f in sorted((tmp_path / "hf").glob("*.safetensors")) if name.encode() in f.read_bytes())
    stored = SafetensorsFolder.open(tmp_path / "hf")
    times, place = file.stat(), stored._stored[name]
    with file.open("r+b") as opened:
        opened.seek(place.start)
        first = opened.read(1)[0]
        opened.seek(place.start)
        opened.write(bytes([first ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(StoreCorrupt, match=r"expert 3\).* is corrupt: CRC-32 .*, expected"):
        store.read_experts([(2, 3)])
    with pytest.raises(CheckpointError, match="ranks hold"):
        open_store(tmp_path / "noted", held=dataclasses.replace(held, group=64))


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_the_conversion_of_the_folder_gives(name, tmp_path):
    small_folder(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "out", name="model", on_progress=quiet)
    same(noted(tmp_path / "hf"), HostStore.open(tmp_path / "out"))


def quantised_folder(folder: Path, name: str) -> None:
    """The folder with matrices as they are published: block-scaled float8, or experts in MXFP4 (groups of 32)."""
    mxfp4 = name == "gpt-oss"
    sizes = {"intermediate_size": 64} if mxfp4 else {"quantization_config": {"weight_block_size": [16, 16]}}
    tensors = published_folder(folder, small_config(name) | sizes)
    draw, form = np.random.default_rng(0), {}
    for key, array in tensors.items():
        if mxfp4 and key.endswith("_proj") and ".experts." in key:
            experts, width, out = array.shape
            form[f"{key}_blocks"] = draw.integers(0, 256, (experts, out, width // 32, 16), np.uint8)
            form[f"{key}_scales"] = draw.integers(118, 124, (experts, out, width // 32), np.uint8)
        elif not mxfp4 and key.endswith("_proj.weight"):
            form[key] = array.astype(ml_dtypes.float8_e4m3fn)
            form[f"{key}_scale_inv"] = draw.uniform(0.5, 2, [-(-n // 16) for n in array.shape]).astype(np.float32)
        else:
            form[key] = array.astype(ml_dtypes.bfloat16)
    write_shards(folder, form, 2)


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss"])
def test_quantised_weights_are_widened_on_the_way(name, tmp_path):
    quantised_folder(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "out", name="model", on_progress=quiet)
    store = noted(tmp_path / "hf")
    same(store, HostStore.open(tmp_path / "out"))
    gate_up, *_ = store.read_experts([(0, 1)])[0, 1]
    assert np.isfinite(gate_up).all()
    assert np.unique(gate_up).size > 20


@pytest.mark.parametrize("form", ["int4", "nvfp4"])
def test_packed_weights_are_those_of_the_same_model_in_plain_form(form, tmp_path):
    plain = quantized_folders(tmp_path / "hf", form)
    convert(plain, tmp_path / "plain", name="model", on_progress=quiet)
    convert(tmp_path / "hf", tmp_path / "out", name="model", on_progress=quiet)
    same(HostStore.open(tmp_path / "out"), HostStore.open(tmp_path / "plain"))
    same(noted(tmp_path / "hf"), HostStore.open(tmp_path / "plain"))


def test_only_the_bytes_of_an_expert_are_read(tmp_path):
    published_folder(tmp_path / "hf")
    store = noted(tmp_path / "hf")
    before = _read_bytes()
    store.read_experts([(1, 2)])
    read = _read_bytes() - before
    assert 3 * 32 * 48 * 4 <= read < 3 * (32 * 48 * 4 + BUFFER) + BUFFER


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("\n")[0].split()[1])


def test_no_weight_is_written(tmp_path):
    tensors = published_folder(tmp_path / "hf")
    noted(tmp_path / "hf")
    written = sorted(p.name for p in (tmp_path / "noted").iterdir())
    assert written == ["checksums.json", "config.json", SOURCE, "tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "noted" / "checksums.json").stat().st_size < sum(a.nbytes for a in tensors.values()) / 10
    assert isinstance(open_store(tmp_path / "noted"), PublishedStore)


def test_a_missing_file_is_not_reported_as_a_damaged_one(tmp_path):
    published_folder(tmp_path / "hf", shards=1)
    store, file = noted(tmp_path / "hf"), tmp_path / "hf" / "model.safetensors"
    whole, start = file.read_bytes(), store._weights._stored[EXPERT].start
    os.truncate(file, start + 10)
    with pytest.raises(StoreCorrupt, match=r"expert 3\) is corrupt: .*model\.safetensors ends within .*experts\.3\.w"):
        store.read_experts([(2, 3)])
    file.write_bytes(whole[:start] + bytes([whole[start] ^ 4]) + whole[start + 1 :])
    with pytest.raises(StoreCorrupt, match=r"expert 3\) in .*model\.safetensors is corrupt: CRC-32") as error:
        store.read_experts([(2, 2), (2, 3)])
    assert list(error.value.failed) == [(2, 3)]
    file.unlink()
    with pytest.raises(StoreMissing, match=r"is missing: .*model\.safetensors is not there any more"):
        store.read_experts([(2, 3)])
    with pytest.raises(StoreMissing, match="has no expert 4 in MoE layer 0: it has 4"):
        store.read_experts([(0, 4)])
    file.write_bytes(whole)
    assert store.read_experts([(2, 3)])


def test_a_folder_that_changed_is_not_opened_and_its_checksums_are_recorded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    published_folder(tmp_path / "hf")
    place = ensure_checksums(tmp_path / "hf")
    assert ensure_checksums(tmp_path / "hf") == place
    published_folder(tmp_path / "hf", seed=1)
    with pytest.raises(CheckpointError, match="has changed since its checksums were recorded"):
        PublishedStore.open(place)
    again = ensure_checksums(tmp_path / "hf")
    assert again != place
    assert PublishedStore.open(again).read_experts([(0, 0)])


def test_what_contradicts_is_named_before_anything_is_noted(tmp_path):
    tensors = published_folder(tmp_path / "hf")
    write_shards(tmp_path / "hf", tensors | {EXPERT: np.zeros((48, 32), np.float32)}, 1)
    with pytest.raises(CheckpointError, match=rf"{EXPERT} has shape \(48, 32\), but config\.json says \(32, 48\)"):
        record_checksums(tmp_path / "hf", tmp_path / "noted", name="model", on_progress=quiet)
    assert not (tmp_path / "noted").exists()


def test_many_readers_at_once_read_the_same(tmp_path):
    published_folder(tmp_path / "hf")
    store = noted(tmp_path / "hf")
    wanted = all_experts(store)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: store.read_experts(wanted), range(16)))
    for expert in wanted:
        assert len({result[expert][0].tobytes() for result in results}) == 1


def test_weights_lie_where_a_device_takes_them_as_they_are(tmp_path):
    published_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    for array in jax.tree.leaves(noted(tmp_path / "hf").non_expert_params()):
        assert array.dtype == np.float32
        assert array.ctypes.data % ALIGNMENT == 0
