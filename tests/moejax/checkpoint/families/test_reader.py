"""Laws of the readers of published configurations: all that is served is read, and what is wrong is named."""

import json
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.families import FAMILIES, read_config
from moejax.params import expert_bytes, parameter_count
from planner.huggingface import parameters

PUBLISHED = {p.stem: p for p in sorted(Path("configs/models").glob("*.json"))}
SERVED = {name: p for name, p in PUBLISHED.items() if json.loads(p.read_text())["model_type"] in FAMILIES}
MIXTRAL = json.loads(PUBLISHED["mixtral-8x7b"].read_text())


@pytest.mark.parametrize("name", SERVED)
def test_published_configurations_have_the_parameters_that_the_planner_counts(name):
    cfg = read_config(SERVED[name], name=name)
    counted = parameters(json.loads(SERVED[name].read_text()))
    assert expert_bytes(cfg, itemsize=1) == counted.expert
    assert cfg.n_moe_layers == counted.moe_layers
    ours = cfg.moe is not None and not _has_router_bias(cfg.family)  # a bias that is always there
    spare = cfg.n_moe_layers * cfg.moe.experts if ours else 0
    assert parameter_count(cfg) == counted.total + spare


def _has_router_bias(family: str) -> bool:
    return family in ("deepseek_v3", "kimi_k2", "glm4_moe", "gpt_oss")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, r"model_type is 'bert' .*, which is not served; served are .*mixtral"),
        ({"architectures": ["LlamaForCausalLM"]}, "names LlamaForCausalLM, but model_type 'mixtral' is Mixtral"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; it must be a whole number"),
        ({"hidden_size": 4100}, "hidden_size 4100 is no multiple of num_attention_heads 32"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5 key/value heads"),
        ({"num_experts_per_tok": 9}, "experts_per_token is 9 with 8 experts"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is served"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; known are"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0, but .* says 1000000.0"),
    ],
)
def test_what_is_not_served_or_contradicts_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config(MIXTRAL | change)


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
