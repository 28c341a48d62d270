"""Parameters and cache counted from a config.json equal the numbers that the models' authors publish."""

from __future__ import annotations

import pytest

from planner.inputs.published import (
    FAMILIES,
    MODELS,
    cache_elements,
    count_parameters,
    find_published,
    published_model,
    unwindowed_cache_elements,
)

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
    "qwen3-32b": 32_762_123_264,
    "qwen3-coder-480b-a35b": 480_154_875_392,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "lfm2-8b-a1b": 8_339_930_560,
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
    "qwen3-0.6b": (0.6, 0.6),
    "qwen3-1.7b": (1.7, 1.7),
    "qwen3-32b": (32.8, 32.8),
    "llama-3.1-70b": (70.6, 70.6),
    "llama-3.1-405b": (405, 405),
    "qwen3-coder-480b-a35b": (480, 35),
    "qwen3-vl-30b-a3b": (30.5, 3.3),
    "qwen3-vl-235b-a22b": (235, 22),
    "glm-4.5v": (106, 12),
    "glm-4.7-flash": (30, 3.6),
    "dots.llm1": (142, 14),
    "solar-open-100b": (102.6, 12),
    "minimax-m2.5": (229, 10),
    "kimi-k2.5": (1026, 32),
    "hy3": (295, 21),
    "hunyuan-a13b": (80, 13),
    "ernie-4.5-21b-a3b": (21.8, 3.3),
    "ernie-4.5-300b-a47b": (300, 47),
    "k-exaone-236b-a23b": (236, 23),
    "trinity-mini": (26, 3.5),
    "trinity-large": (398, 13),
    "qwen3-next-80b-a3b": (80, 3),
    "qwen3.5-35b-a3b": (35, 3),
    "qwen3.5-27b": (27, 27),
    "lfm2-8b-a1b": (8.3, 1.5),
    "lfm2-24b-a2b": (24, 2.3),
    "nemotron-3-nano-30b-a3b": (31.6, 3.6),
    "kimi-linear-48b-a3b": (48, 3),
    "ling-3.0-flash": (124, 5.1),
    "deepseek-v3.2": (671, 37),
    "glm-5": (744, 40),
    "mistral-small-4": (119, 6.5),
    "mistral-large-3": (673, 39),
    "mimo-v2-flash": (309, 15),
    "gemma-4-26b-a4b": (25.2, 3.8),
}
# Cache bytes per token at two bytes a value; DeepSeek-V3 as in "Insights into DeepSeek-V3" (2025).
CACHE = {"deepseek-v3": 70_272, "mixtral-8x7b": 131_072, "qwen3-235b-a22b": 192_512, "gpt-oss-20b": 24_576}


CARDS_WITH_MARGIN = {
    "glm-4.5-air": 0.12,
    "glm-4.5v": 0.12,
    "glm-4.7-flash": 0.09,
    "minimax-m2.5": 0.11,
    "deepseek-v2-lite": 0.11,
    "granite-3.1-3b-a800m": 0.11,
    "qwen3-next-80b-a3b": 0.3,
    "qwen3.5-35b-a3b": 0.16,
    "kimi-linear-48b-a3b": 0.17,
    "ling-3.0-flash": 0.08,
}
"""Cards whose figure is rounded down further than the others'."""
WITHOUT_A_CARD = {"granitemoeshared", "llama4_text", "ministral3", "mistral4", "laguna", "step3p5", "step3p7"}
WITHOUT_A_CARD |= {"gemma4_text"}
"""Families whose only published models are tests, or stand within a larger model, or of which none is shipped in
configs/models."""


def model(name: str, **changes: object):
    values = find_published(name)[1]
    return published_model(values | changes)


def test_every_family_and_every_shipped_model_is_checked():
    shipped = {p.stem for p in MODELS.glob("*.json")}
    assert shipped == set(CARDS)
    assert {model(name).family for name in shipped} == set(FAMILIES) - WITHOUT_A_CARD


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_parameter_count_is_the_published_one(name):
    assert count_parameters(model(name)).total == EXACT[name]


@pytest.mark.parametrize("name", sorted(CARDS))
def test_total_and_active_parameters_round_to_the_model_card(name):
    counts = count_parameters(model(name))
    total, active = CARDS[name]
    assert counts.total / 1e9 == pytest.approx(total, rel=0.03)
    assert counts.active / 1e9 == pytest.approx(active, rel=CARDS_WITH_MARGIN.get(name, 0.075))


@pytest.mark.parametrize(("name", "active"), [("gpt-oss-20b", 3.61e9), ("gpt-oss-120b", 5.13e9)])
def test_the_cards_of_gpt_oss_leave_the_embedding_out_of_the_active_parameters(name, active):
    assert count_parameters(model(name)).active == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "change", "biases"),
    [
        ("qwen3-8b", {"attention_bias": True}, 36 * ((32 + 2 * 8) * 128 + 4096)),
        ("llama-3.1-8b", {"mlp_bias": True}, 32 * (2 * 14336 + 4096)),
        ("glm-4.5-air", {"attention_bias": False}, -46 * (96 + 2 * 8) * 128),
        ("deepseek-v3", {"attention_bias": True}, 61 * (1536 + 512 + 64 + 7168)),
        ("lfm2-8b-a1b", {"conv_bias": True}, 18 * 5 * 2048),
        ("lfm2-8b-a1b", {"use_expert_bias": False}, -22 * 32),
        ("nemotron-3-nano-30b-a3b", {"use_conv_bias": False}, -23 * (4096 + 2 * 8 * 128)),
        ("nemotron-3-nano-30b-a3b", {"moe_latent_size": 2688}, 23 * 2 * 2688 * 2688),
    ],
)
def test_biases_are_counted(name, change, biases):
    assert count_parameters(model(name, **change)).total - count_parameters(model(name)).total == biases


@pytest.mark.parametrize("name", sorted(CACHE))
def test_cache_bytes_per_token_are_the_published_ones(name):
    assert cache_elements(model(name))[0] * 2 == CACHE[name]


def test_layers_with_a_window_keep_a_bounded_cache():
    per_token, per_request = cache_elements(model("gpt-oss-20b"))
    assert per_token == 12 * 2 * 8 * 64
    assert per_request == 12 * 2 * 8 * 64 * 128
    assert unwindowed_cache_elements(model("gpt-oss-20b")) == 2 * per_token


def test_windows_with_heads_of_their_own_keep_theirs_and_a_server_has_rows_of_one_width():
    mimo = model("mimo-v2-flash")
    assert cache_elements(mimo) == (9 * 4 * (192 + 128), 39 * 129 * 8 * (192 + 128))
    assert unwindowed_cache_elements(mimo) == 48 * 8 * (192 + 128)


def test_layers_whose_values_are_keys_have_no_matrix_of_values_and_cache_both():
    gemma = model("gemma-4-26b-a4b")
    assert cache_elements(gemma) == (5 * 2 * 2 * 512, 25 * 1024 * 2 * 8 * 256)
    values = find_published("gemma-4-26b-a4b")[1]
    apart = values | {"text_config": values["text_config"] | {"attention_k_eq_v": False}}
    others = 5 * (2 * 8 - 2) * 512 * 2816  # eight heads of keys, as layers with a window have, and eight of values
    assert count_parameters(published_model(apart)).total == count_parameters(gemma).total + others


def test_layers_in_chunks_keep_a_chunk():
    per_token, per_request = cache_elements(model("llama-4-scout"))
    assert per_token == 12 * 2 * 8 * 128
    assert per_request == 36 * 2 * 8 * 128 * 8192


def test_a_model_of_windows_alone_is_planned_as_if_it_had_none():
    assert cache_elements(model("mistral-7b-v0.3", sliding_window=4096)) == cache_elements(model("mistral-7b-v0.3"))


def test_a_model_with_experts_and_no_routed_layer_counts_as_dense():
    counts = count_parameters(model("deepseek-v3", first_k_dense_replace=61))
    assert (counts.moe_layers, counts.experts, counts.expert, counts.router, counts.shared) == (0, 0, 0, 0, 0)
    assert counts.dense == 61 * 3 * 7168 * 18432
