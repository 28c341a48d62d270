"""Laws of quantised matrices: each form comes out as the tools that write it widen it, whatever its shape; parts that
are missing or do not fit are named."""

import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.quantized.form import row_chunks
from moejax.checkpoint.quantized.fp4 import FP4
from moejax.checkpoint.quantized.integers import unpack
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.eight_bit import EightBit
from moejax.config.weight_formats import dequantize, from_published
from tests.parity import quantized
from tests.parity.quantized import Answer, recorded

ANSWERS = {each.name: each for each in recorded()}
MISSING = [
    name for name in ("torch", "transformers", "compressed_tensors", "awq") if importlib.util.find_spec(name) is None
]


def opened(folder: Path, stored: dict[str, np.ndarray], config: dict, dtype: str = "float32") -> SafetensorsFolder:
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"torch_dtype": dtype, "quantization_config": config}))
    return SafetensorsFolder.open(folder)


@pytest.mark.parametrize("name", ANSWERS)
def test_each_form_is_widened_as_its_own_tool_widens_it(tmp_path, name):
    answer = ANSWERS[name]
    # compressed-tensors widens NVFP4 to bfloat16 in any case.
    folder = opened(tmp_path, answer.stored, answer.config, "bfloat16" if "nvfp4" in name else "float32")
    assert folder.names() == {"w.weight"}
    folder.check_tensor("w.weight", answer.numbers.shape, "anything")
    found = folder.read("w.weight")
    assert (found.shape, found.dtype) == (answer.numbers.shape, folder.dtype("w.weight"))
    np.testing.assert_array_equal(found.astype(np.float32), answer.numbers)


def test_numbers_are_those_of_the_tools_as_they_are_held(tmp_path):
    held = set()
    for name, answer in ANSWERS.items():
        folder = opened(tmp_path, answer.stored, answer.config)
        if (form := folder.packed("w.weight")) is not None:
            packed = from_published(folder.read_planes("w.weight"), form)
            assert packed is not None
            numbers = np.asarray(dequantize(packed))
            rounding = 0 if form.scale != "e4m3" else 2**-8  # of the tool: a scale times the factor in bfloat16
            rounded = numbers.astype(folder.dtype("w.weight")).astype(np.float32)
            np.testing.assert_allclose(rounded, answer.numbers, rtol=rounding)
            held.add(name)
            eight = isinstance(packed, EightBit)
            assert eight == form.is_eight_bit == ("8" in name.split(",")[0].split(" ")[0])
            assert not eight or packed.numbers.nbytes == answer.numbers.size
    widened = ("awq", "int4 groups of 8,", "int4 channel, float32", "int4 groups of 32, float32")
    assert held == {name for name in ANSWERS if not name.startswith(widened)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_is_held_as_it_is_where_its_groups_are_in_order(tmp_path, ordered, bits):
    draw = np.random.default_rng(3)
    inputs, outputs, size = 96, 8, 32
    q, zeros = (draw.integers(0, 2**bits - 1, (n, outputs), dtype=np.uint8) for n in (inputs, inputs // size))
    scales = draw.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    groups = np.arange(inputs, dtype=np.int32) // size
    groups = draw.permutation(groups) if ordered else groups
    stored = {"w.qweight": np.ascontiguousarray(pack(q.T, bits).T), "w.qzeros": pack(zeros, bits), "w.scales": scales}
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": False, "desc_act": ordered}
    folder = opened(tmp_path, stored | {"w.g_idx": groups}, config)
    packed = from_published(folder.read_planes("w.weight"), folder.packed("w.weight"))
    assert (packed is None) == ordered
    if packed is not None:
        expected = scales[groups].astype(np.float32) * (q.astype(np.float32) - (zeros[groups].astype(np.float32) + 1))
        np.testing.assert_array_equal(np.asarray(dequantize(packed)), expected.T)


@pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}")
def test_the_recorded_answers_are_those_of_the_tools():
    for answer in quantized.answers():
        np.testing.assert_array_equal(answer.numbers, ANSWERS[answer.name].numbers, answer.name)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_large_matrix_is_widened_in_pieces_of_rows(tmp_path, name, monkeypatch):
    answer = ANSWERS[name]
    whole = opened(tmp_path, answer.stored, answer.config).read("w.weight")
    for module in ("scaled", "fp4", "integers"):
        monkeypatch.setattr(
            f"moejax.checkpoint.quantized.{module}.row_chunks", lambda rows, _: row_chunks(rows, 16 << 18)
        )
    np.testing.assert_array_equal(opened(tmp_path, answer.stored, answer.config).read("w.weight"), whole)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_part_that_is_missing_or_of_another_shape_is_named(tmp_path, name):
    answer = ANSWERS[name]
    shape = answer.numbers.shape
    parts = [key for key in answer.stored if key not in ("w.weight", "w.weight_packed", "w.qweight", "w.weight_shape")]
    for key in parts:
        rest = {other: value for other, value in answer.stored.items() if other != key}
        if "zero_point" not in key:
            with pytest.raises(CheckpointError, match=r"is missing|without scales that are known"):
                opened(tmp_path, rest, answer.config).check_tensor("w.weight", shape, "anything")
        wrong = np.repeat(answer.stored[key][None], 3, axis=0)
        with pytest.raises(CheckpointError, match=rf"{key} has shape \(3, .*; the weights, .* need \(") as error:
            opened(tmp_path, rest | {key: wrong}, answer.config).check_tensor("w.weight", shape, "anything")
        assert str(wrong.shape) in str(error.value)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers `[rows, n]` as int32 words, the first in the lowest bits: the definition, bit by bit."""
    words = np.zeros((len(values), -(-values.shape[1] * bits // 32)), np.uint64)
    for i in range(values.shape[1]):
        for bit in range(bits):
            word, place = divmod(i * bits + bit, 32)
            words[:, word] |= ((values[:, i].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)) << np.uint64(place)
    return words.astype(np.uint32).view(np.int32)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_words_hold_their_integers_without_gaps(bits, rows, count, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(values, bits), bits, count), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_scales_its_integers_less_their_zero_points_by_group(tmp_path, bits, form, ordered):
    """`scales[g] * (q - (zeros[g] + 1))` for an input of group g, as AutoGPTQ; its second format has no + 1."""
    draw = np.random.default_rng(bits)
    inputs, outputs, size = 40, 24, 8
    q = draw.integers(0, 2**bits, (inputs, outputs), dtype=np.uint8)
    zeros = draw.integers(0, 2**bits, (inputs // size, outputs), dtype=np.uint8)
    scales = draw.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    groups = np.arange(inputs, dtype=np.int32) // size
    groups = draw.permutation(groups) if ordered else groups
    stored = {"w.qweight": np.ascontiguousarray(pack(q.T, bits).T), "w.qzeros": pack(zeros, bits), "w.scales": scales}
    stored |= {"w.g_idx": groups, "w.bias": np.zeros(outputs, np.float16)}
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": form}
    folder = opened(tmp_path, stored, config)
    folder.check_tensor("w.weight", (outputs, inputs), "anything")
    zero = zeros.astype(np.float32)[groups] + (form == "gptq")
    expected = (scales.astype(np.float32)[groups] * (q - zero)).T.astype(np.float16)
    assert folder.dtype("w.weight") == np.float16
    np.testing.assert_array_equal(folder.read("w.weight"), expected)
    assert folder.is_void_bias("w.bias")
    assert not opened(tmp_path, stored | {"w.bias": np.ones(outputs, np.float16)}, config).is_void_bias("w.bias")


def test_groups_of_compressed_tensors_may_be_ordered(tmp_path):
    answer = ANSWERS["int4 groups of 8, zero points, float32 scales"]
    order = np.random.default_rng(0).permutation(40)
    groups = (np.arange(40, dtype=np.int32) // 8)[order]
    packed = answer.stored["w.weight_packed"]
    turned = pack(unpack(packed, 4, 40)[:, order], 4)
    folder = opened(tmp_path, answer.stored | {"w.weight_packed": turned, "w.weight_g_idx": groups}, answer.config)
    np.testing.assert_array_equal(folder.read("w.weight"), answer.numbers[:, order])


def test_nvfp4_of_modelopt_is_multiplied_where_that_of_compressed_tensors_is_divided(tmp_path):
    answer = ANSWERS["nvfp4, float32 scales"]
    scale, whole = answer.stored["w.weight_scale"], answer.stored["w.weight_global_scale"]
    stored = {"w.weight": answer.stored["w.weight_packed"], "w.weight_scale": scale}
    stored |= {"w.weight_scale_2": np.array(0.25, np.float32), "w.input_scale": np.array(3, np.float32)}
    folder = opened(tmp_path, stored, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    folder.check_tensor("w.weight", answer.numbers.shape, "anything")
    packed = stored["w.weight"]
    numbers = np.stack([FP4[packed & 15], FP4[packed >> 4]], -1).reshape(len(packed), -1)
    per_group = np.repeat(scale.astype(np.float32), 16, -1)
    np.testing.assert_array_equal(folder.read("w.weight"), numbers * (per_group * np.float32(0.25)))
    np.testing.assert_allclose(numbers * (per_group / whole), answer.numbers, rtol=1e-2)
    assert folder.unused == {"w.input_scale"}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale", ["tensor", "expert", "channel", "last", "block", "exponents"])
def test_an_expert_of_a_fused_matrix_is_read_with_its_own_scales(tmp_path, fused, scale):
    draw = np.random.default_rng(5)
    numbers = draw.normal(size=(3, 10, 12)).astype(ml_dtypes.float8_e4m3fn)
    shape = {"tensor": (), "expert": (3,), "channel": (3, 10, 1), "last": (3, 1, 12)}.get(scale, (3, 2, 3))
    scales = draw.uniform(0.5, 2, shape).astype(np.float32)
    if scale == "exponents":
        scales = np.exp2(draw.integers(-3, 3, shape)).astype(np.float32).astype(ml_dtypes.float8_e8m0fnu)
    blocks = {"weight_block_size": [8, 5]} if shape == (3, 2, 3) else {}
    end = "_scale_inv" if blocks else "_scale"
    folder = opened(tmp_path, {"up": numbers, f"up{end}": scales}, {"quant_method": "fp8"} | blocks)
    folder.check_tensor("up", (3, 10, 12), "experts")
    wide = scales.astype(np.float32)
    if blocks:
        wide = wide.repeat(8, 1)[:, :10].repeat(5, 2)[:, :, :12]
    expected = numbers.astype(np.float32) * (wide.reshape(3, 1, 1) if scale == "expert" else wide)
    if fused:
        np.testing.assert_array_equal(folder.read("up"), expected)
    for expert in range(3):
        np.testing.assert_array_equal(folder.read("up", expert), expected[expert])


def test_scales_of_activations_and_of_the_cache_are_left_out(tmp_path):
    weight = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    one = np.ones(1, np.float32)
    beside = {f"w.{name}": one for name in ("input_scale", "k_scale", "v_scale", "output_scale")}
    folder = opened(tmp_path, {"w.weight": weight, "w.weight_scale": one} | beside, {"quant_method": "fp8"})
    assert (folder.names(), folder.unused) == ({"w.weight"}, frozenset(beside))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quantization 'bitsandbytes' is not known; weights in this form are",
        ),
        ({"quant_method": "awq", "version": "gemv"}, "awq 'gemv' weights of 4 bits"),
        ({"quant_method": "modelopt", "quant_algo": "W2A16"}, "quant_algo 'W2A16'"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}},
            "the sparse format 'marlin-24'",
        ),
    ],
)
def test_a_form_that_is_not_read_is_named_with_those_that_are(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=rf"config\.json, .*{message}.*Read are float32, .*NVFP4"):
        opened(tmp_path, {"w.weight": np.zeros((2, 2), np.uint8)}, config)


def test_packed_integers_need_the_configuration_that_describes_them(tmp_path):
    answer: Answer = ANSWERS["int4 groups of 32, float32 scales"]
    with pytest.raises(CheckpointError, match=r"w\.weight_packed is w in int4 .*does not say so for this module"):
        opened(tmp_path, answer.stored, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"w\.qweight is w in AWQ or GPTQ"):
        opened(tmp_path, {"w.qweight": np.zeros((2, 2), np.int32)}, {"quant_method": "fp8"})


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights.*save_pretrained"):
        SafetensorsFolder.open(tmp_path)
