"""A model with sharded dense layers is the same model, and each of its shards can be read by itself."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.host_store import HostStore, StoreCorrupt
from moejax.checkpoint.manifest import content_hash
from moejax.checkpoint.shard_dense import shard_dense, sharded_dense_config
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.moe_config import MoEConfig
from moejax.config.parameter_counts import expert_counts, parameter_count
from moejax.config.weight_formats import weight_bytes
from tests.support.models import DENSE, MIXTRAL, SHARED, model_folder
from tests.support.reference import forward

LEADING = dataclasses.replace(MIXTRAL, name="leading-dense", dense_layers=(0, 2))


@pytest.fixture(params=[SHARED, LEADING], ids=lambda cfg: cfg.name)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a model, and that of the same model with sharded dense layers."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    model_folder(whole, request.param)
    done = []
    shard_dense(whole, sharded, lambda so_far, total: done.append((so_far, total)))
    assert done[-1][0] == done[-1][1] > 0
    return whole, sharded


def test_a_sharded_model_has_the_logits_of_the_replicated_one(folders: tuple[Path, Path]) -> None:
    (whole, sharded), tokens = folders, [3, 17, 5, 80, 41, 2]
    before, after = ModelConfig.load(whole), ModelConfig.load(sharded)
    logits = forward(load_params(whole), before, tokens)
    np.testing.assert_allclose(forward(load_params(sharded), after, tokens), logits, rtol=1e-9, atol=1e-9)


def test_a_sharded_model_has_the_same_parameters_and_fewer_of_them_on_every_rank(folders: tuple[Path, Path]) -> None:
    before, after = map(ModelConfig.load, folders)
    dense = 3 * before.d_model * before.d_ff * before.layer_kinds.count("dense")
    assert parameter_count(after) == parameter_count(before)
    assert weight_bytes(before, experts=False) - weight_bytes(after, experts=False) == 4 * dense
    assert np.subtract(expert_counts(after), expert_counts(before)).tolist() == [dense, dense]
    assert after.sharded_layers == tuple(i for i, kind in enumerate(before.layer_kinds) if kind == "dense")
    assert after.n_moe_layers == before.n_layers


def test_each_shard_is_read_by_itself_and_compared_with_its_checksum(folders: tuple[Path, Path]) -> None:
    whole, sharded = folders
    before, cfg = load_params(whole), ModelConfig.load(sharded)
    store, layer, shard = HostStore.open(sharded), cfg.sharded_layers[-1], 2
    gate_up, down = store.read_experts([(layer, shard)])[layer, shard]
    ffn = jax.tree.map(lambda leaf: leaf[-1], before.segments[-1][-1].ffn)
    width = cfg.d_ff // cfg.moe.experts
    cut = slice(shard * width, (shard + 1) * width)
    gate, up = np.split(ffn.gate_up, 2)
    np.testing.assert_array_equal(gate_up, np.concatenate([gate[cut], up[cut]]))
    np.testing.assert_array_equal(down, ffn.down[:, cut])
    assert store.is_intact((layer, shard), gate_up, down)
    (chunk,) = sharded.glob(f"params/state/segments.{len(cfg.segments) - 1}.*.moe.experts.down/c/*/{shard}/0/0")
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(StoreCorrupt, match=f"expert {shard} of MoE layer {layer}"):
        HostStore.open(sharded).read_experts([(layer, shard)])
    assert content_hash(whole) != content_hash(sharded)


def test_dense_layers_that_cannot_be_sharded_are_refused_or_left() -> None:
    assert sharded_dense_config(MIXTRAL) is None
    assert sharded_dense_config(DENSE) is None
    odd = dataclasses.replace(LEADING, moe=MoEConfig(experts=5, experts_per_token=2, d_expert=24))
    with pytest.raises(ConfigError, match="width 48 cannot be cut into 5 equal shards"):
        sharded_dense_config(odd)
    with pytest.raises(ConfigError, match="has no dense layers"):
        dataclasses.replace(MIXTRAL, shard_dense=True)
