"""Laws of the model configuration: complete before it exists, the same after JSON."""

import dataclasses
import json

import pytest

from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from tests.support.models import ALL, DENSE, MIXTRAL, SHARDED, SHARED


@pytest.mark.parametrize("cfg", ALL, ids=lambda c: c.name)
def test_json_gives_it_back(cfg):
    assert ModelConfig.from_json(cfg.to_json()) == cfg


def test_hashable_so_that_a_compiled_program_belongs_to_one():
    assert len({*ALL, *ALL}) == 3


def test_segments_spell_the_layers():
    for cfg in ALL:
        assert tuple(kind for pattern, repeats in cfg.segments for kind in pattern * repeats) == cfg.layer_kinds
    assert SHARED.segments == ((("dense", "dense", "moe"), 2), (("dense",), 1))
    assert (MIXTRAL.n_moe_layers, SHARED.n_moe_layers, DENSE.n_moe_layers) == (3, 2, 0)


def test_an_unknown_key_names_the_nearest():
    values = json.loads(SHARED.to_json()) | {"n_kv_head": 1}
    with pytest.raises(ConfigError, match=r"unknown key 'n_kv_head' .* Did you mean 'n_kv_heads'\?"):
        ModelConfig.from_json(json.dumps(values))
    values = json.loads(SHARED.to_json())
    values["moe"]["expert"] = 3
    with pytest.raises(ConfigError, match="Did you mean 'experts'"):
        ModelConfig.from_json(json.dumps(values))


def test_missing_keys_are_all_named():
    with pytest.raises(ConfigError, match="lacks name, vocab_size, d_model"):
        ModelConfig.from_json("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 2}, "3 query heads cannot share 2 key/value heads"),
        ({"moe_every": 8}, "moe_every is 8 in a model of 7 layers"),
        ({"moe_every": 0}, "moe_every is 0"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SHARED, **change)


def test_experts_per_token_are_bounded_by_the_experts():
    for k in (0, 9):
        with pytest.raises(ConfigError, match=f"experts_per_token is {k} with 8 experts"):
            MoEConfig(experts=8, experts_per_token=k, d_expert=4)
    with pytest.raises(ConfigError, match="gate is 'max'"):
        MoEConfig(experts=8, experts_per_token=2, d_expert=4, gate="max")


def test_a_folder_without_configuration_says_what_a_model_folder_holds(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist; a model folder holds"):
        ModelConfig.load(tmp_path)


def test_config_json_keeps_the_names_of_folders_written_before() -> None:
    stored = json.loads(SHARDED.to_json())
    assert stored["divide_dense"] is True
    assert "shard_dense" not in stored
    assert ModelConfig.from_json(json.dumps(stored)) == SHARDED
