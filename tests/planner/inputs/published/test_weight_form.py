"""Laws of weight forms: every way in which quantization is published gives its bytes, scales included."""

from __future__ import annotations

import json

import pytest

from planner import InputError
from planner.inputs.published import find_published, published_model, read_model, workload_of

KIMI = find_published("kimi-k2")[1] | {"quantization_config": None}
KIMI_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
}
NVFP4 = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["*self_attn*", "lm_head", "*shared_experts*"]}
FP8_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}


def form(quantization: object, name: str = "deepseek-v3", **changes: object):
    return published_model(find_published(name)[1] | {"quantization_config": quantization} | changes).form


@pytest.mark.parametrize(
    ("quantization", "name", "expert_bytes"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 1 + 4 / 128**2),
        ({"quant_method": "fp8", "weight_block_size": [64, 32]}, "fp8", 1 + 4 / 2048),
        ({"quant_method": "fbgemm_fp8"}, "fp8", 1),
        ({"quant_method": "mxfp4"}, "mxfp4", 4.25 / 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4", 0.5 + 2.5 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 1),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", 1),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 0.5625),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}, "mxfp4", 0.53125),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": FP8_GROUP}}, "fp8", 1),
        (KIMI_INT4, "int4", 0.5625),
        (None, "bfloat16", 2),
    ],
)
def test_every_published_method_has_its_bytes(quantization, name, expert_bytes):
    found = form(quantization)
    assert (found.format, found.experts, found.problem) == (name, pytest.approx(expert_bytes), "")


def test_what_is_exempt_keeps_its_format():
    found = form(KIMI_INT4)
    assert (found.attention, found.shared, found.dense, found.base) == (2, 2, 2, 2)
    found = form({"quant_method": "modelopt", **NVFP4})
    assert (found.attention, found.shared, found.dense) == (2, 2, 0.5625)
    found = form({"quant_method": "mxfp4"}, "gpt-oss-20b")
    assert (found.attention, found.experts) == (2, 0.53125)


def test_layers_that_are_exempt_count_by_layer():
    exempt = [f"model.layers.{i}" for i in range(31)]
    found = form({"quant_method": "fp8", "modules_to_not_convert": exempt})
    assert found.attention == pytest.approx((31 * 2 + 30) / 61)
    assert found.experts == pytest.approx((28 * 2 + 30) / 58)
    found = form({"quant_method": "fp8", "ignore": ["model.layers.*.mlp.experts.*.down_proj"]})
    assert (found.experts, found.attention) == (2, 1)


def test_groups_may_name_their_modules():
    groups = {
        "group_0": FP8_GROUP,
        "group_1": {"targets": ["re:.*experts.*"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}},
    }
    found = form({"quant_method": "compressed-tensors", "config_groups": groups})
    assert (found.format, found.experts, found.attention) == ("nvfp4", 0.5625, 1)


@pytest.mark.parametrize("inside", [True, False])
def test_it_is_found_beside_and_inside_the_part_for_text(inside):
    text = {k: v for k, v in KIMI.items() if v is not None} | ({"quantization_config": KIMI_INT4} if inside else {})
    values = {"model_type": "kimi_k25", "text_config": text} | ({} if inside else {"quantization_config": KIMI_INT4})
    assert published_model(values).form.format == "int4"


def test_the_file_of_modelopt_is_read_beside_the_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": KIMI}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": NVFP4}))
    plan = read_model(str(tmp_path))
    assert plan.weight_format == "nvfp4"
    total = plan.moe_layers * plan.experts * plan.expert_bytes + plan.rest_bytes
    assert total < 8 * 141e9 * 0.6, "fits 8 H200"
    (tmp_path / "hf_quant_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"hf_quant_config\.json holds a list"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "exl2"}, "quantization 'exl2' is not known; pass --weights, one of float32"),
        ({"quant_method": "awq", "bits": 3}, "awq .gemm. weights of 3 bits are not known"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo 'MIXED_PRECISION' is not known"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": []}}}, "weights is missing"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is .128.; it must be two numbers"),
        ({"quant_method": "fp8", "ignore": "lm_head"}, "ignore is 'lm_head'; it must be a list of str"),
    ],
)
def test_a_form_that_is_not_known_is_an_error_unless_the_weights_are_given(quantization, message):
    values = find_published("deepseek-v3")[1] | {"quantization_config": quantization}
    with pytest.raises(InputError, match=message):
        workload_of(published_model(values))
    assert workload_of(published_model(values, weights="fp8")).weight_format == "fp8"
