"""The workload of a published model: its bytes, its cache, and errors that name what is wrong with a file."""

from __future__ import annotations

import json

import pytest

from planner import InputError
from planner.inputs.published import MODELS, count_parameters, find_published, published_model, read_model


def test_bytes_follow_the_format_of_the_weights():
    v3, as16 = read_model("deepseek-v3"), read_model("deepseek-v3", weights="bfloat16")
    expert = 3 * 7168 * 2048
    assert as16.expert_bytes == 2 * expert
    assert v3.expert_bytes == expert + expert * 4 // 128**2
    assert read_model("gpt-oss-20b").expert_bytes == pytest.approx(3 * 2880 * 2880 * 4.25 / 8, rel=1e-3)
    assert v3.moe_layers == 58
    assert v3.cache_splits == 1
    assert v3.moe_layers * v3.experts * v3.expert_bytes + v3.rest_bytes == pytest.approx(671e9, rel=0.01)


def test_int4_is_counted_with_its_scales():
    int4 = read_model("mixtral-8x7b", weights="int4")
    assert int4.expert_bytes == 3 * 4096 * 14336 * 0.5625


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.json")), ids=lambda p: p.stem)
def test_bytes_of_a_model_in_sixteen_bits_are_two_for_each_parameter(path):
    w = read_model(str(path), weights="bfloat16")
    p = count_parameters(published_model(json.loads(path.read_text())))
    assert w.moe_layers * w.experts * w.expert_bytes + w.rest_bytes == 2 * p.total
    assert (w.total_parameters, w.active_parameters) == (p.total, p.active)


def test_a_request_fills_a_window_or_a_chunk_before_it_is_full():
    scout = read_model("llama-4-scout")
    assert scout.cache_bytes(8192) == 8192 * 4 * scout.cache_bytes_per_token
    assert scout.cache_bytes(100_000) == 100_000 * scout.cache_bytes_per_token + scout.cache_bytes_per_request
    everything = 100_000 * 4 * scout.cache_bytes_per_token
    assert everything / scout.cache_bytes(100_000) == pytest.approx(3.2, rel=0.01)


def test_a_workload_can_be_given_in_plain_numbers(tmp_path):
    file = tmp_path / "big.json"
    file.write_text(json.dumps({"moe_layers": 3, "experts": 1000, "experts_per_token": 8, "expert_bytes": 5}))
    assert (read_model(str(file)).experts, read_model(str(file)).name) == (1000, "big")
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(find_published("mixtral-8x7b")[1]))
    assert read_model(str(folder)).total_parameters == 46_702_792_704


def test_a_configuration_that_lists_its_routed_layers_is_no_list_of_numbers(tmp_path):
    values = find_published("llama-4-scout")[1]["text_config"] | {"moe_layers": list(range(48))}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_model(str(tmp_path)).experts == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        (
            '{"model_type": "mixtrel"}',
            "unknown key 'mixtrel' in /.*/config.json .model_type.. Did you mean 'mixtral'",
        ),
        ('{"model_type": "mixtral", "hidden_size": 8}', "num_attention_heads is missing"),
        ('{"moe_layers": 1, "expert": 4}', "unknown key 'expert' .* Did you mean 'experts'"),
        (
            '{"moe_layers": 1, "experts": 4, "experts_per_token": 5, "expert_bytes": 1}',
            "5 experts per token out of 4",
        ),
        (
            '{"moe_layers": 0, "experts": 4, "experts_per_token": 1, "expert_bytes": 1}',
            "moe_layers is 0, it must be at least 1",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_model(str(file))


def test_a_format_that_is_not_known_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"Did you mean 'fp8'\?"):
        read_model("mixtral-8x7b", weights="fp9")
