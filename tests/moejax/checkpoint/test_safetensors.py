"""Laws of published weights: every range is read as it lies, quantised ones as their authors widen them."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.quantized.fp4 import FP4, dequantize_mxfp4
from moejax.checkpoint.safetensors import SafetensorsFolder
from tests.support.published import write_shards

DRAW = np.random.default_rng(0)
TENSORS = {
    "a.weight": DRAW.normal(size=(6, 4)).astype(np.float32),
    "b": DRAW.normal(size=(3, 2, 5)).astype(ml_dtypes.bfloat16),
    "c.bias": DRAW.normal(size=7).astype(np.float16),
}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_and_every_row_is_read_as_it_lies(tmp_path, shards):
    write_shards(tmp_path, TENSORS, shards)
    folder = SafetensorsFolder.open(tmp_path)
    assert folder.names() == set(TENSORS)
    assert folder.bytes == sum(a.nbytes for a in TENSORS.values())
    for name, array in TENSORS.items():
        assert (folder.shape(name), folder.dtype(name)) == (array.shape, array.dtype)
        np.testing.assert_array_equal(folder.read(name), array)
        for row in range(len(array)):
            np.testing.assert_array_equal(folder.read(name, row), array[row])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.tuples(st.integers(1, 16), st.integers(1, 16)), st.integers(0, 99))
def test_a_block_of_float8_is_its_numbers_times_its_scale(tmp_path_factory, rows, width, block, seed):
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(rows, width)).astype(ml_dtypes.float8_e4m3fn)
    scale = draw.uniform(0.5, 2, size=(-(-rows // block[0]), -(-width // block[1]))).astype(np.float32)
    folder = tmp_path_factory.mktemp("float8")
    save_file({"w.weight": weight, "w.weight_scale_inv": scale}, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    wide = SafetensorsFolder.open(folder).read("w.weight")
    for r in range(rows):
        for c in range(width):
            number = np.float32(weight[r, c]) * scale[r // block[0], c // block[1]]
            assert wide[r, c] == number.astype(ml_dtypes.bfloat16)


def test_mxfp4_is_sixteen_numbers_times_a_power_of_two():
    blocks = np.arange(32, dtype=np.uint8).reshape(2, 1, 16) + np.uint8(64)
    wide = dequantize_mxfp4(blocks, np.array([[127], [130]], np.uint8))
    assert wide.shape == (2, 32)
    for row, factor in ((0, 1), (1, 8)):
        for i, byte in enumerate(blocks[row, 0]):
            assert wide[row, 2 * i] == FP4[byte & 15] * factor
            assert wide[row, 2 * i + 1] == FP4[byte >> 4] * factor


def test_mxfp4_is_widened_as_transformers_does():
    torch = pytest.importorskip("torch", reason="needs moejax[parity]")
    theirs = pytest.importorskip("transformers.integrations.mxfp4", reason="needs moejax[parity]")
    blocks = DRAW.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = DRAW.integers(90, 150, (2, 6, 3), dtype=np.uint8)
    expected = theirs.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
    np.testing.assert_array_equal(dequantize_mxfp4(blocks, scales).swapaxes(-1, -2).astype(np.float32), expected)


def test_quantised_tensors_go_by_the_name_of_their_numbers(tmp_path):
    blocks = DRAW.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = DRAW.integers(120, 130, (2, 6, 3), dtype=np.uint8)
    weight = DRAW.normal(size=(5, 6)).astype(ml_dtypes.float8_e4m3fn)
    scale = np.full((2, 2), 2, np.float32)
    stored = {
        "up_blocks": blocks,
        "up_scales": scales,
        "w.weight": weight,
        "w.weight_scale_inv": scale,
        "up_bias": scale,
    }
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}})
    )
    folder = SafetensorsFolder.open(tmp_path)
    assert folder.names() == {"up", "up_bias", "w.weight"}
    assert folder.shape("up") == (2, 96, 6)
    assert folder.dtype("up") == folder.dtype("w.weight") == ml_dtypes.bfloat16
    np.testing.assert_array_equal(folder.read("up", 1), dequantize_mxfp4(blocks[1], scales[1]).T)
    np.testing.assert_array_equal(folder.read("up"), dequantize_mxfp4(blocks, scales).swapaxes(1, 2))
    np.testing.assert_array_equal(folder.read("w.weight"), weight.astype(ml_dtypes.bfloat16) * 2)
    folder.check_tensor("up", (2, 96, 6), "experts")
    folder.check_tensor("w.weight", (5, 6), "queries")


def test_scales_that_are_missing_or_of_another_shape_are_named(tmp_path):
    weight = np.zeros((5, 6), ml_dtypes.float8_e4m3fn)
    save_file({"w.weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.weight_scale_inv of shape \(1, 1\) .*is missing"):
        SafetensorsFolder.open(tmp_path).check_tensor("w.weight", (5, 6), "queries")
    save_file({"w.weight": weight, "w.weight_scale_inv": np.ones((2, 1), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.weight_scale_inv has shape \(2, 1\); .*fp8 .* need \(1, 1\)"):
        SafetensorsFolder.open(tmp_path).check_tensor("w.weight", (5, 6), "queries")


def test_numbers_of_another_kind_are_named(tmp_path):
    save_file({"w": np.zeros((2, 2), np.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor w has .* I32 without scales .* Read are"):
        SafetensorsFolder.open(tmp_path).check_tensor("w", (2, 2), "queries")


@pytest.mark.parametrize("keep", [-3, 20, 4, 0])
def test_a_file_cut_short_is_named(tmp_path, keep):
    write_shards(tmp_path, TENSORS, 1)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no whole safetensors file \(.*\)\. Fetch"):
        SafetensorsFolder.open(tmp_path)


def test_a_file_cut_short_after_it_was_opened_is_named(tmp_path):
    write_shards(tmp_path, TENSORS, 1)
    folder = SafetensorsFolder.open(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    last = max(TENSORS, key=lambda name: folder._stored[name].start)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends within tensor .*: \d+ of its \d+ bytes"):
        folder.read(last)


def test_a_folder_that_lacks_a_file_says_which(tmp_path):
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        SafetensorsFolder.open(tmp_path)
    write_shards(tmp_path, TENSORS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing; .* lists 3 files"):
        SafetensorsFolder.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read: KeyError"):
        SafetensorsFolder.open(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for i in range(2):
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / f"{i}.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in .*0\.safetensors and in .*1\.safetensors"):
        SafetensorsFolder.open(tmp_path)


def test_a_second_copy_of_the_weights_beside_them_is_not_read(tmp_path):
    """transformers and vLLM read model.safetensors, or the files of its index, and nothing beside them."""
    for shards, beside in ((1, "consolidated"), (1, "model.fp16"), (3, "consolidated")):
        write_shards(tmp_path, TENSORS, shards)
        other = tmp_path / f"{beside}.safetensors"
        save_file({"tok_embeddings.weight": np.zeros(2, np.float32)}, other)
        assert SafetensorsFolder.open(tmp_path).names() == TENSORS.keys()
    for file in tmp_path.glob("model*"):
        file.unlink()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "weights.safetensors")
    assert SafetensorsFolder.open(tmp_path).names() == {"a"}


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path):
    write_shards(tmp_path, TENSORS, 2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("\ufeff" + index.read_text(), "utf-8")
    assert SafetensorsFolder.open(tmp_path).names() == TENSORS.keys()
