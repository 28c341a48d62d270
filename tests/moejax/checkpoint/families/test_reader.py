"""Laws of the reader of configurations to serve: it counts what the planner counts, and errors name what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moejax.checkpoint.families import SERVED_FAMILIES, read_config
from moejax.config.config_values import ConfigError
from moejax.config.kv_cache import bytes_per_token
from moejax.config.model_config import ModelConfig
from moejax.config.parameter_counts import expert_bytes, parameter_count
from moejax.tools.inspect import active_parameters, main
from planner.errors import InputError
from planner.inputs.cache_formats import CACHE_FORMATS
from planner.inputs.published import (
    FAMILIES,
    cache_number_bytes,
    count_parameters,
    published_model,
    unwindowed_cache_elements,
)
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.families.published import CASES
from tests.support.families.small import small_config

PUBLISHED = {p.stem: p for p in sorted(Path("configs/models").glob("*.json"))}
SERVED = {name: p for name, p in PUBLISHED.items() if json.loads(p.read_text())["model_type"] in SERVED_FAMILIES}
MIXTRAL = json.loads(PUBLISHED["mixtral-8x7b"].read_text())
CONFIGS = {name: json.loads(p.read_text()) for name, p in SERVED.items()} | {
    f"small {name}": small_config(name) for name in CASES
}
ALL_DENSE = small_config("deepseek-v3") | {"first_k_dense_replace": 3}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_server_counts_what_the_planner_counts(name):
    model, cfg = published_model(CONFIGS[name]), read_config(CONFIGS[name], name=name)
    counted = count_parameters(model)
    assert parameter_count(cfg) == counted.total
    assert active_parameters(cfg) == counted.active
    assert expert_bytes(cfg, itemsize=1) == counted.expert
    assert cfg.n_moe_layers == counted.moe_layers
    for form in CACHE_FORMATS:
        counted_bytes = unwindowed_cache_elements(model) * cache_number_bytes(model, form)
        assert bytes_per_token(replace(cfg, cache_format=form)) == round(counted_bytes)
    assert cfg.state_elements == model.state_elements


def test_every_family_that_is_planned_is_served():
    assert SERVED_FAMILIES.keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"first_k_dense_replace": 2, "moe_layer_freq": 1, "num_hidden_layers": 2},
    ],
)
def test_experts_without_a_routed_layer_are_an_error(change, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"8 experts, but none of its \d layers is routed \(first_k_dense_replace"):
        read_config(ALL_DENSE | change)
    (tmp_path / "config.json").write_text(json.dumps(ALL_DENSE | change))
    assert main([str(tmp_path / "config.json")]) == 1
    assert "none of its" in capsys.readouterr().err


def test_a_step_past_the_last_layer_is_an_error_in_words_of_the_configuration():
    with pytest.raises(ConfigError, match=r"none of its 1 layers is routed .*decoder_sparse_step"):
        read_config(small_config("qwen2-moe") | {"num_hidden_layers": 1})


def test_a_configuration_of_ours_without_a_routed_layer_is_an_error():
    values = json.loads(read_config(small_config("deepseek-v3")).to_json())
    with pytest.raises(ConfigError, match="none of its 3 layers is routed"):
        ModelConfig.from_json(json.dumps(values | {"dense_layers": [0, 1, 2]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, r"model_type is 'bert' .*, which is not served; served are .*mixtral"),
        ({"architectures": ["LlamaForCausalLM"]}, "names LlamaForCausalLM, but model_type 'mixtral' is Mixtral"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; it must be a whole number"),
        ({"hidden_size": 4100}, "hidden_size 4100 is no multiple of num_attention_heads 32"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5 key/value heads"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 with 8 experts"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is served"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; known are"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0, but .* says 1000000.0"),
    ],
)
def test_what_is_not_served_or_contradicts_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config(MIXTRAL | change)


LFM2 = json.loads(PUBLISHED["lfm2-8b-a1b"].read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["conv"] * 24}, "all 24 layers are conv; at least one must be full_attention"),
        ({"layer_types": ["conv", "full_attention"]}, "layer_types has 2 entries, but num_hidden_layers is 24"),
        ({"layer_types": ["conv"] * 23 + ["mamba"]}, "layer_types names 'mamba'; known are conv and full_attention"),
        ({"layer_types": None}, "layer_types is missing"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1; it must be a whole number of at least 2"),
        ({"conv_bias": "no"}, "conv_bias is 'no'; it must be true or false"),
        ({"num_dense_layers": 25}, "num_dense_layers is 25 in a model of 24 layers"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok is 33 with 32 experts"),
        ({"tie_word_embeddings": False}, "tie_embedding is True, but tie_word_embeddings is False"),
        ({"partial_rotary_factor": 0.5}, "leaves 32 of 64 numbers of a head rotated; lfm2_moe rotates all"),
        ({"conv_dim": 1024}, "conv_dim is 1024, but hidden_size is 2048; they must be equal"),
        ({"mlp_layer_types": ["dense"] * 24}, "mlp_layer_types is .*, which lfm2_moe does not have"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is served"),
        ({"architectures": ["Lfm2ForCausalLM"]}, "names Lfm2ForCausalLM, but model_type 'lfm2_moe' is Lfm2Moe"),
    ],
)
def test_what_lfm2_cannot_have_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config(LFM2 | change)


def test_layers_of_lfm2_are_few_patterns_and_their_state_is_small():
    cfg = read_config(LFM2)
    assert cfg.segments == ((("dense",), 2), (("moe",) * 4, 4), (("moe",) * 3, 2))
    assert cfg.state_elements == 18 * 2 * 2048
    assert "short_convolution" not in read_config(MIXTRAL).to_json()
    assert ModelConfig.from_json(cfg.to_json()) == cfg


def test_layers_with_heads_of_their_own_are_few_patterns():
    cfg = read_config(json.loads(PUBLISHED["mimo-v2-flash"].read_text()))
    assert cfg.segments == ((("dense",), 1), (("moe",) * 6, 7), (("moe",), 4), (("moe",), 1))
    assert cfg.cache_widths == (8 * 192, 8 * 128)
    assert cfg.of_layer(0).n_kv_heads == 4
    assert cfg.of_layer(1).n_kv_heads == 8
    for name in ("mimo_v2_flash", "laguna, all", "step3p7"):
        small = read_config(small_config(name))
        assert ModelConfig.from_json(small.to_json()) == small
    later = {"windowed", "d_value", "value_scale", "gate_by_head", "gate_function", "expert_limits", "dense_limits"}
    assert not later & json.loads(read_config(MIXTRAL).to_json()).keys()


NEMOTRON = json.loads(PUBLISHED["nemotron-3-nano-30b-a3b"].read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hybrid_override_pattern": "ME*X"}, "hybrid_override_pattern has 'X'; known are M, \\*, E, -"),
        ({"hybrid_override_pattern": "ME*E"}, "num_hidden_layers is 52, but 4 blocks are named"),
        ({"hybrid_override_pattern": "E" + "M" * 50 + "*"}, "block 0 is moe, but none of linear_attention or full_att"),
        ({"hybrid_override_pattern": "MEE*" * 13}, "block 2 is moe, but none of linear_attention or full_attention"),
        ({"hybrid_override_pattern": "ME" * 26}, "26 of 26 layers are Mamba-2; at least one must be that and one have"),
        ({"hybrid_override_pattern": "*E" * 26}, "0 of 26 layers are Mamba-2"),
        (
            {"layers_block_type": ["mamba"] * 51 + ["conv"]},
            "layers_block_type names 'conv'; known are linear_attention",
        ),
        ({"n_groups": 7}, "mamba_num_heads 64 is no multiple of n_groups 7"),
        ({"conv_kernel": 1}, "conv_kernel is 1; it must be a whole number of at least 2"),
        ({"time_step_limit": [0.0, 1.0]}, "time_step_limit is .0.0, 1.0.; step sizes with bounds are not supported"),
        ({"moe_latent_size": 0}, "moe_latent_size is 0; it must be a whole number of at least 1"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'; only 'relu2' is served"),
        ({"use_bias": True}, "use_bias is True; only False is served"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2; only 1 is served"),
    ],
)
def test_what_nemotron_cannot_have_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config(NEMOTRON | change)


def test_blocks_of_nemotron_are_layers_of_few_patterns():
    cfg = read_config(NEMOTRON)
    assert (cfg.n_layers, len(cfg.state_layers), cfg.n_moe_layers) == (29, 23, 23)
    assert cfg.layer_kinds.count("bare") == 6
    assert len(cfg.segments) == 5
    assert cfg.state_elements == 23 * (64 * 64 * 128 + 3 * (4096 + 2 * 8 * 128))
    assert not {"mamba", "bare_layers", "activation", "d_latent"} & set(read_config(MIXTRAL).to_json().split('"'))
    assert ModelConfig.from_json(cfg.to_json()) == cfg


KIMI = json.loads(PUBLISHED["kimi-linear-48b-a3b"].read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["linear_attention"] * 27}, "all 27 layers are linear_attention; at least one must be full"),
        ({"linear_attn_config": {"kda_layers": [1, 2], "full_attn_layers": [4]}}, "each of the layers 1 to 27 must be"),
        (
            {"linear_attn_config": {"short_conv_kernel_size": 1}},
            "short_conv_kernel_size is 1; it must be a whole number",
        ),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4, but num_experts_per_token is 8"),
        ({"mla_use_nope": False}, "mla_use_nope is False; only True is served"),
        (
            {"moe_router_activation_func": "softmax"},
            "moe_router_activation_func is 'softmax'; only 'sigmoid' is served",
        ),
    ],
)
def test_what_kimi_linear_cannot_have_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config(KIMI | change)


def test_ling_2_6_has_the_model_type_of_ling_3_and_is_refused():
    ling = json.loads(PUBLISHED["ling-3.0-flash"].read_text())
    earlier = ling | {"architectures": ["BailingMoeV2_5ForCausalLM"]}
    with pytest.raises(InputError, match=r"whose lightning attention is not supported; Ling 3 .* is"):
        published_model(earlier)
    with pytest.raises(ConfigError, match="architectures names BailingMoeV2_5ForCausalLM, but model_type 'bailing_hyb"):
        read_config(earlier)
    with pytest.raises(ConfigError, match="no_kda_lora is False; only True is served"):
        read_config(ling | {"no_kda_lora": False})


def test_layers_of_kimi_linear_and_of_ling_are_those_that_their_fields_say():
    cfg = read_config(KIMI)
    assert [i for i in range(27) if i not in cfg.state_layers] == [3, 7, 11, 15, 19, 23, 26]
    assert cfg.unrotated_layers == tuple(range(27))
    assert cfg.state_elements == 20 * (32 * 128 * 128 + 3 * 3 * 32 * 128)
    assert ModelConfig.from_json(cfg.to_json()) == cfg
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4}
    ling = read_config({"model_type": "bailing_hybrid", "intermediate_size": 48} | sizes)
    assert [i for i in range(12) if i not in ling.state_layers] == [5, 11]
    assert (ling.gate_by_head, ling.unrotated_layers, ling.rope_base) == (True, (), 6e6)
    assert ling.kimi_delta is not None
    assert (ling.kimi_delta.least_log, ling.kimi_delta.d_low) == (-5.0, 0)


def test_a_context_can_be_shorter_than_published_and_not_longer():
    assert read_config(MIXTRAL, max_context=100).max_context == 100
    with pytest.raises(ConfigError, match="is 32768; a context of 40000 cannot be served"):
        read_config(MIXTRAL, max_context=40000)


def test_a_folder_gives_name_stop_tokens_and_begin_token(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: No such file"):
        read_config(folder)
    (folder / "config.json").write_text(json.dumps(MIXTRAL | {"eos_token_id": 2, "bos_token_id": 1}))
    plain = read_config(folder)
    assert (plain.name, plain.stop_tokens, plain.bos_token) == ("small", (2,), None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    full = read_config(folder)
    assert (full.stop_tokens, full.bos_token) == ((2, 7), 1)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list; a JSON object is needed"):
        read_config(folder)


@pytest.mark.parametrize(
    ("files", "stop"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|stop|>"}}, (2, 257)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|stop|>"}}}, (2, 257)),
        ({"special_tokens_map.json": {"eos_token": "<|end|>"}}, (2, 256)),
        ({"tokenizer_config.json": {"eos_token": "x", "added_tokens_decoder": {"9": {"content": "x"}}}}, (2, 9)),
        ({"tokenizer_config.json": {"eos_token": "A"}}, (2, 65)),
        ({"tokenizer_config.json": {"eos_token": "no such token"}}, (2,)),
        ({"tokenizer_config.json": {"eos_token": None}}, (2,)),
        ({}, (2,)),
    ],
)
def test_the_end_token_of_the_tokenizer_stops_an_answer_too(tmp_path, files, stop):
    for name, values in (files | {"config.json": MIXTRAL | {"eos_token_id": 2}}).items():
        (tmp_path / name).write_text("\ufeff" + json.dumps(values), "utf-8")
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().format.inner.to_str(), "utf-8")
    assert read_config(tmp_path).stop_tokens == stop
