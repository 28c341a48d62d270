"""Laws of the reader of published configurations: it reads what `transformers` reads, and errors name what is wrong."""

from __future__ import annotations

import importlib.util
import json

import pytest

from planner import InputError
from planner.inputs.published import NOT_READ, count_parameters, find_published, published_model, read_config_values
from tests.support.transformers_defaults import completed, given, recorded

GIVEN = given()
MIXTRAL = find_published("mixtral-8x7b")[1]


@pytest.mark.parametrize("name", GIVEN)
def test_absent_fields_are_read_as_transformers_reads_them(name):
    assert published_model(GIVEN[name], weights="bfloat16") == published_model(recorded()[name], weights="bfloat16")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra `parity`")
def test_the_recorded_configurations_are_those_of_transformers():
    assert {name: json.loads(json.dumps(completed(values))) for name, values in GIVEN.items()} == recorded()


@pytest.mark.parametrize(
    ("name", "left_out", "same"),
    [
        ("deepseek-v3", ("first_k_dense_replace", "q_lora_rank"), True),
        ("gpt-oss-20b", ("head_dim", "num_key_value_heads", "attention_bias", "layer_types", "sliding_window"), True),
        ("mixtral-8x7b", ("num_key_value_heads",), True),
        ("glm-4.5", ("first_k_dense_replace",), False),
    ],
)
def test_a_model_is_the_same_without_the_fields_that_its_class_has_as_defaults(name, left_out, same):
    values = find_published(name)[1]
    shorter = {key: value for key, value in values.items() if key not in left_out}
    assert (count_parameters(published_model(shorter)) == count_parameters(published_model(values))) is same


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts"])
def test_the_number_of_experts_goes_by_three_names(key):
    values = {k: v for k, v in find_published("qwen3-30b-a3b")[1].items() if k != "num_experts"}
    assert count_parameters(published_model(values | {key: 128})).total == 30_532_122_624
    with pytest.raises(InputError, match="num_local_experts is 4 but n_routed_experts is 5"):
        published_model(values | {"num_local_experts": 4, "n_routed_experts": 5})


@pytest.mark.parametrize("value", [0, None])
def test_a_shared_expert_of_no_width_is_none(value):
    values = find_published("qwen1.5-moe-a2.7b")[1] | {"shared_expert_intermediate_size": value}
    experts = published_model(values).experts
    assert experts is not None
    assert (experts.d_shared, experts.shared_gate) == (0, False)


def test_layers_are_routed_by_step_and_by_list():
    values = find_published("qwen1.5-moe-a2.7b")[1] | {"num_hidden_layers": 6}
    assert published_model(values | {"decoder_sparse_step": 2}).routed_layers == (1, 3, 5)
    assert published_model(values | {"mlp_only_layers": [0, 4]}).routed_layers == (1, 2, 3, 5)
    assert published_model(values | {"decoder_sparse_step": 7}).routed_layers == ()
    assert published_model(find_published("llama-4-maverick")[1]).routed_layers == tuple(range(1, 48, 2))


def test_the_kinds_of_layers_are_given_one_by_one_or_as_the_first_ones():
    values = find_published("glm-4.7-flash")[1] | {"num_hidden_layers": 4}
    assert published_model(values).dense_layers == (0,)
    kinds = ["sparse", "dense", "sparse", "dense"]
    assert published_model(values | {"mlp_layer_types": kinds}).dense_layers == (1, 3)
    with pytest.raises(InputError, match="mlp_layer_types has 2 entries, but num_hidden_layers is 4"):
        published_model(values | {"mlp_layer_types": kinds[:2]})
    with pytest.raises(InputError, match="mlp_layer_types names 'odd'; known are dense and sparse"):
        published_model(values | {"mlp_layer_types": ["odd", *kinds[1:]]})


def test_a_number_that_differs_by_layer_is_an_error():
    values = find_published("hunyuan-a13b")[1]
    experts = published_model(values).experts
    assert experts is not None
    assert experts.experts_per_token == 8
    with pytest.raises(InputError, match=r"moe_topk is \[8, 4\]; layers that differ in it are not supported"):
        published_model(values | {"moe_topk": [8, 4]})


def test_a_fixed_alpha_stretches_the_base_at_every_length():
    rope = published_model(find_published("hunyuan-a13b")[1]).rope
    assert rope.kind == "default"
    assert rope.theta == pytest.approx(10_000 * 1000 ** (128 / 126))


def test_layers_without_rotary_embedding_are_those_without_a_window():
    values = find_published("k-exaone-236b-a23b")[1]
    model = published_model(values)
    assert model.unrotated_layers == tuple(i for i, window in enumerate(model.windows) if window is None)
    assert len(model.unrotated_layers) == 12
    every = {"sliding_window": None, "layer_types": ["full_attention"] * 48}
    assert published_model(values | every).unrotated_layers == ()
    assert published_model(find_published("llama-4-scout")[1]).unrotated_layers == tuple(range(3, 48, 4))


def test_a_decoder_within_a_larger_model_is_of_the_family_of_the_whole():
    values = find_published("glm-4.5v")[1]
    assert published_model(values).family == "glm4v_moe"
    tied = published_model(values | {"tie_word_embeddings": True})
    assert tied.tied_head
    inner = values["text_config"] | {"eos_token_id": None}
    assert published_model(values | {"text_config": inner, "eos_token_id": [7]}).stop_tokens == (7,)
    inner |= {"eos_token_id": 5}
    assert published_model(values | {"text_config": inner, "eos_token_id": [7]}).stop_tokens == (5,)


@pytest.mark.parametrize(
    "values", [{"model_type": kind} for kind in NOT_READ] + [{"text_config": {"model_type": "minimax_m3_text"}}]
)
def test_a_family_that_is_known_and_not_read_says_what_is_lacking(values):
    with pytest.raises(InputError, match=r"not supported yet; the decoder lacks ."):
        published_model(values)


def test_windows_and_chunks_are_of_single_layers():
    gpt, scout = (published_model(find_published(name)[1]) for name in ("gpt-oss-20b", "llama-4-scout"))
    assert gpt.windows == (128, None) * 12
    assert scout.windows == (8192, 8192, 8192, None) * 12
    assert (gpt.chunked, scout.chunked) == (False, True)


def test_mimo_reads_the_same_with_the_fields_of_its_own_class():
    values = find_published("mimo-v2-flash")[1]
    own = {
        "hybrid_layer_pattern": [int(i != 0 and (i + 1) % 6 != 0) for i in range(48)],
        "moe_layer_freq": [0] + [1] * 47,
        "swa_num_key_value_heads": 8,
        "swa_rope_theta": 10_000,
        "rope_theta": 5_000_000,
        "partial_rotary_factor": 0.334,
        "add_swa_attention_sink_bias": True,
        "layernorm_epsilon": 1e-5,
    }
    assert published_model(values | own) == published_model(values)


def test_step_reads_the_same_with_the_fields_of_its_own_class():
    sizes = {"model_type": "step3p5", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 8, "sliding_window": 7, "num_nextn_predict_layers": 1}
    full, window = "full_attention", "sliding_attention"
    own = {
        "layer_types": [window, full, window, window, window],
        "num_attention_groups": 4,
        "attention_other_setting": {"num_attention_heads": 12},
        "rope_theta": [1e4, 5e6, 1e4, 1e4, 1e4],
        "partial_rotary_factors": [1.0, 0.5, 1.0, 1.0, 1.0],
        "moe_layers_enum": "1,3",
        "moe_num_experts": 6,
        "moe_top_k": 2,
        "swiglu_limits": [0.0, 0.0, 0.0, 7, None],
    }
    transformers = {
        "layer_types": [window, full, window, window],
        "num_key_value_heads": 4,
        "num_sliding_attention_heads": 12,
        "rope_parameters": {
            window: {"rope_type": "default", "rope_theta": 1e4},
            full: {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        },
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "swiglu_limits": [None, 0, 0.0, 7.0],
    }
    assert published_model(sizes | own) == published_model(sizes | transformers)


LAGUNA = {"model_type": "laguna", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 48}
LAGUNA |= {"num_attention_heads": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads_per_layer": [16, 24, 16]}, "has 16, 24 for layers of sliding_attention; layers of one"),
        ({"num_attention_heads_per_layer": [16]}, "has 1 entries, but num_hidden_layers is 3"),
        ({"gating": "per-token"}, "gating is 'per-token'; known are True, 'per-head', 'per-element'"),
        ({"model_type": "mimo_v2_flash", "moe_layer_freq": [1]}, "moe_layer_freq has 1 entries, but num_hidden_layers"),
        (
            {"model_type": "mimo_v2_flash", "hybrid_layer_pattern": [1], "layer_types": None},
            "hybrid_layer_pattern has 1",
        ),
        ({"model_type": "step3p5", "sliding_window": 7, "swiglu_limits": [1.0]}, "swiglu_limits has 1 entries, but"),
        ({"model_type": "step3p5", "sliding_window": 7, "moe_layers_enum": "1,x"}, "moe_layers_enum is '1,x'; it must"),
        ({"model_type": "step3p5"}, "layer_types has sliding_attention, but sliding_window is missing"),
    ],
)
def test_layers_of_one_kind_must_be_alike(change, message):
    with pytest.raises(InputError, match=message):
        published_model(LAGUNA | change)


GEMMA = find_published("gemma-4-26b-a4b")[1]["text_config"]


def test_gemma_4_has_two_kinds_of_attention_however_it_is_spelt():
    model = published_model(GEMMA)
    assert model.windows == ((1024,) * 5 + (None,)) * 5
    assert (model.head_size, model.kv_heads, model.keys_as_values, model.rope.kind) == (512, 2, True, "proportional")
    assert (model.rope.size, model.rope.pairs, model.logit_cap) == (512, 64, 30.0)
    own = model.windowed
    assert (own.n_kv_heads, own.d_head, own.rope.theta, own.rope.kind) == (8, 256, 10_000.0, "default")
    assert model.experts.d_shared == 2112
    by_layer = {f"{i:02}": {"head_dim": 512, "num_key_value_heads": 2} for i in range(5, 30, 6)}
    without = {key: value for key, value in GEMMA.items() if "global" not in key and key != "rope_parameters"}
    assert published_model(without | {"per_layer_config": by_layer}) == model
    assert published_model(GEMMA | {"layer_types": ["sliding_attention"] * 30}).windows[-2:] == (1024, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input is 256: inputs of each layer by token"),
        ({"num_kv_shared_layers": 10}, "num_kv_shared_layers is 10: layers that take keys and values from a layer"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all': an encoder"),
        ({"per_layer_config": {"3": {"head_dim": 64}}}, "layer 3 has a window and heads of its own"),
        (
            {"per_layer_config": {"05": {"head_dim": 64}}},
            "everything have 8 heads of 64, 8 heads of 256",
        ),
    ],
)
def test_what_the_small_models_of_gemma_4_have_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        published_model(GEMMA | change)


def test_stop_tokens_are_those_given_or_of_the_class():
    assert published_model(MIXTRAL).stop_tokens == (2,)
    assert published_model(MIXTRAL | {"eos_token_id": None}).stop_tokens == ()
    assert published_model(MIXTRAL | {"eos_token_id": [5, 7]}).stop_tokens == (5, 7)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL), encoding="utf-8-sig")
    assert read_config_values(tmp_path) == MIXTRAL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": -4}, "hidden_size is -4; it must be a whole number of at least 1"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 with 8 experts"),
        ({"layer_types": ["full"], "model_type": "gpt_oss"}, "layer_types has 1 entries, but num_hidden_layers is 32"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [32]}, "layer 32 is named in a model of 32 layers"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 33}, "first_k_dense_replace is 33 in a model of 32"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "factor is 0.0; it must be above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
    ],
)
def test_a_field_that_is_wrong_is_named(change, message):
    with pytest.raises(InputError, match=message):
        published_model(MIXTRAL | change)


def test_a_model_that_is_not_known_lists_those_that_are():
    with pytest.raises(InputError, match=r"neither a file nor one of the models .*deepseek-v3"):
        find_published("deepseek-v33")
