"""The numbers read from config.json are those the models' authors publish."""

from __future__ import annotations

import json

import pytest

from planner import InputError
from planner.families import FAMILIES
from planner.huggingface import MODELS, cache_elements, parameters, read_config, read_model

# Parameters in the published safetensors files where all of them belong to the decoder, without
# multi-token-prediction layers and vision towers.
EXACT = {
    "mixtral-8x7b": 46_702_792_704,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "olmoe-1b-7b": 6_919_161_856,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "phi-3.5-moe": 41_873_153_344,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}
# Totals and active parameters in billions as the model cards round them.
CARDS = {
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (141, 39),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen2-57b-a14b": (57.4, 14),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "olmoe-1b-7b": (6.9, 1.3),
    "deepseek-v2": (236, 21),
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v3": (671, 37),
    "kimi-k2": (1026, 32),
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "glm-4.5": (355, 32),
    "glm-4.5-air": (106, 12),
    "llama-4-scout": (109, 17),
    "llama-4-maverick": (400, 17),
    "granite-3.1-3b-a800m": (3.3, 0.8),
    "granite-3.1-1b-a400m": (1.3, 0.4),
    "phi-3.5-moe": (41.9, 6.6),
    "llama-3.1-8b": (8.0, 8.0),
    "mistral-7b-v0.3": (7.2, 7.2),
    "qwen2.5-7b": (7.6, 7.6),
    "qwen3-8b": (8.2, 8.2),
}
# Cache bytes per token at two bytes a value; DeepSeek-V3 as in "Insights into DeepSeek-V3" (2025).
CACHE = {"deepseek-v3": 70_272, "mixtral-8x7b": 131_072, "qwen3-235b-a22b": 192_512, "gpt-oss-20b": 24_576}


def config(name: str) -> dict:
    return read_config(MODELS / f"{name}.json")


def test_every_family_and_every_shipped_model_is_checked():
    shipped = {p.stem for p in MODELS.glob("*.json")}
    assert shipped == set(CARDS)
    kinds = {c.get("model_type") for n in shipped for c in (config(n), config(n).get("text_config", {}))}
    assert set(FAMILIES) <= kinds


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_parameter_count_is_the_published_one(name):
    assert parameters(config(name)).total == EXACT[name]


@pytest.mark.parametrize("name", sorted(CARDS))
def test_total_and_active_parameters_round_to_the_model_card(name):
    p = parameters(config(name))
    total, active = CARDS[name]
    assert p.total / 1e9 == pytest.approx(total, rel=0.03)
    without_embedding = (p.active - p.embedding) / 1e9
    assert min(abs(without_embedding / active - 1), abs(p.active / 1e9 / active - 1)) < 0.07


@pytest.mark.parametrize("name", sorted(CACHE))
def test_cache_bytes_per_token_are_the_published_ones(name):
    assert cache_elements(config(name))[0] * 2 == CACHE[name]


def test_layers_with_a_window_keep_a_bounded_cache():
    per_token, per_request = cache_elements(config("gpt-oss-20b"))
    assert per_token == 12 * 2 * 8 * 64
    assert per_request == 12 * 2 * 8 * 64 * 128


def test_bytes_follow_the_format_of_the_weights():
    v3, as16 = read_model("deepseek-v3"), read_model("deepseek-v3", weights="bfloat16")
    expert = 3 * 7168 * 2048
    assert as16.expert_bytes == 2 * expert
    assert v3.expert_bytes == expert + expert * 4 // 128**2
    assert read_model("gpt-oss-20b").expert_bytes == pytest.approx(3 * 2880 * 2880 * 4.25 / 8, rel=1e-3)
    assert v3.moe_layers == 58
    assert v3.cache_splits == 1
    assert v3.moe_layers * v3.experts * v3.expert_bytes + v3.rest_bytes == pytest.approx(671e9, rel=0.01)


def test_a_workload_can_be_given_in_plain_numbers(tmp_path):
    file = tmp_path / "big.json"
    file.write_text(json.dumps({"moe_layers": 3, "experts": 1000, "experts_per_token": 8, "expert_bytes": 5}))
    assert (read_model(str(file)).experts, read_model(str(file)).name) == (1000, "big")
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config("mixtral-8x7b")))
    assert read_model(str(folder)).total_parameters == EXACT["mixtral-8x7b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        (
            '{"model_type": "mixtrel"}',
            "unknown key 'mixtrel' in config.json .model_type.. Did you mean 'mixtral'",
        ),
        ('{"model_type": "mixtral", "hidden_size": 8}', "has no 'num_hidden_layers'|has no"),
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
def test_a_wrong_config_is_named(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_model(str(file))


def test_a_wrong_size_or_format_is_named(tmp_path):
    broken = {**config("mixtral-8x7b"), "hidden_size": -4}
    with pytest.raises(InputError, match="hidden_size is -4"):
        parameters(broken)
    with pytest.raises(InputError, match=r"Did you mean 'fp8'\?"):
        read_model("mixtral-8x7b", weights="fp9")
    with pytest.raises(InputError, match=r"neither a file nor one of the models .*deepseek-v3"):
        read_model("deepseek-v33")
