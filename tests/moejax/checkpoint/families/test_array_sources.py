"""Laws of the name maps: every number of the parameter tree has its place in a checkpoint, once."""

import dataclasses
import json
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from moejax.checkpoint.families import array_sources, is_unused, read_config
from moejax.checkpoint.families.latent import PairedHeads
from moejax.checkpoint.families.source import PickedRows, PlusOne
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.params import is_expert, tensor_specs
from planner.inputs.published import published_model
from tests.moejax.checkpoint.families.test_reader import SERVED
from tests.support.models import MIXTRAL


def smallest_of_each_family() -> list[str]:
    """A published configuration of every family: the one with the fewest experts."""
    found: dict[str, tuple[int, str]] = {}
    for name, path in SERVED.items():
        model = published_model(json.loads(path.read_text()))
        experts = model.experts.experts if model.experts else 0
        found[model.family] = min(found.get(model.family, (experts, name)), (experts, name))
    return [name for _, name in found.values()]


def first_layers(name: str) -> ModelConfig:
    """The first layers of a published model: the others are like them."""
    cfg = read_config(SERVED[name])
    layers = max(5, cfg.attention_layers[0] + 1)
    dense = tuple(i for i in cfg.dense_layers if i < 3)
    states, bare = (tuple(i for i in each if i < layers) for each in (cfg.state_layers, cfg.bare_layers))
    fewer = {"full_layers": (0, 2), "unrotated_layers": (), "dense_layers": dense, "state_layers": states}
    return dataclasses.replace(cfg, n_layers=layers, bare_layers=bare, **fewer)


@pytest.fixture(params=smallest_of_each_family())
def cfg(request):
    return first_layers(request.param)


def test_every_array_of_the_tree_comes_from_somewhere_once(cfg):
    filled, specs = Counter(), tensor_specs(cfg)
    for entry in array_sources(cfg):
        filled[entry.path] += 1
        lead = (entry.repeat,) * (entry.repeat is not None) + (entry.expert,) * (entry.expert is not None)
        whole = specs[entry.path].shape
        assert all(0 <= i < n for i, n in zip(lead, whole, strict=False))
        assert (*whole[: len(lead)], *entry.shape) == whole
    for path, spec in specs.items():
        lead = spec.shape[: 2 if is_expert(path) else 1] if path.startswith("segments.") else ()
        assert filled[path] == np.prod(lead, dtype=int)


def test_transforms_keep_every_number_of_their_tensors(cfg):
    seen = set()
    for entry in array_sources(cfg):
        if entry.tensors and entry.path not in seen:
            seen.add(entry.path)
            shapes = [t.shape if t.index is None else t.shape[1:] for t in entry.tensors]
            assert np.prod(entry.shape, dtype=int) <= sum(np.prod(s, dtype=int) for s in shapes)
            assert not any(is_unused(cfg, t.name) for t in entry.tensors)


@pytest.mark.parametrize(
    ("name", "layers", "head", "beside"),
    [
        ("kimi-k2.5", "language_model.model.layers.", "language_model.lm_head.weight", "vision_tower.patch_embed.w"),
        ("qwen3-vl-30b-a3b", "model.language_model.layers.", "lm_head.weight", "model.visual.blocks.0.w"),
        ("qwen3.5-35b-a3b", "model.language_model.layers.", "lm_head.weight", "model.visual.blocks.0.w"),
        ("glm-4.5v", "model.language_model.layers.", "lm_head.weight", "model.visual.blocks.0.w"),
    ],
)
def test_a_decoder_beside_other_parts_is_found_and_they_are_left(name, layers, head, beside):
    cfg = first_layers(name)
    names = {tensor.name for entry in array_sources(cfg) for tensor in entry.tensors}
    assert head in names
    assert f"{layers}{cfg.n_layers - 1}.input_layernorm.weight" in names
    assert is_unused(cfg, beside)
    assert is_unused(cfg, f"{layers}{cfg.n_layers}.input_layernorm.weight") == (not name.startswith("qwen3"))
    assert not any(is_unused(cfg, each) for each in names)


def test_gemma_4_publishes_keys_as_values_and_its_dense_part_has_the_first_norms():
    cfg = first_layers("gemma-4-26b-a4b")
    layer, entries = "model.language_model.layers.2.", [e for e in array_sources(cfg) if e.layer == 2]
    qkv = next(e for e in entries if e.path.endswith(".qkv"))
    assert [(t.name, t.shape) for t in qkv.tensors] == [
        (f"{layer}self_attn.q_proj.weight", (16 * 512, 2816)),
        (f"{layer}self_attn.k_proj.weight", (2 * 512, 2816)),
    ]
    norms = {e.path.split(".", 3)[-1]: e.tensors[0].name for e in entries if e.tensors}
    assert norms["moe.shared_norm"] == f"{layer}pre_feedforward_layernorm.weight"
    assert norms["ffn_norm"] == f"{layer}pre_feedforward_layernorm_2.weight"
    assert norms["ffn_post_norm"] == f"{layer}post_feedforward_layernorm.weight"
    assert is_unused(cfg, "model.vision_tower.patch_embedder.input_proj.weight")


def test_paired_heads_are_turned_and_values_are_not():
    heads = PairedHeads(heads=2, kv_heads=1, size=4)
    q, k, v = (np.arange(n)[:, None] + 100 * i for i, n in enumerate((8, 4, 4)))
    turned = heads([q, k, v])[:, 0].tolist()
    assert turned == [0, 2, 1, 3, 4, 6, 5, 7, 100, 102, 101, 103, 200, 201, 202, 203]
    assert heads.shapes((16, 5)) == ((8, 5), (4, 5), (4, 5))


def test_rows_that_lie_group_by_group_are_picked_kind_by_kind():
    rows = PickedRows(groups=2, sizes=(1, 2), picked=(1, 0), below=(3,))
    first, below = np.arange(6)[:, None], np.arange(10, 13)[:, None]
    assert rows([first, below])[:, 0].tolist() == [1, 2, 4, 5, 0, 3, 10, 11, 12]
    assert rows.shapes((9, 7)) == ((6, 7), (3, 7))
    assert PickedRows(groups=2, sizes=(1, 2), picked=(0,))([first])[:, 0].tolist() == [0, 3]


def test_scales_published_less_1_keep_what_bfloat16_would_round():
    small = np.array([0.001], ml_dtypes.bfloat16)
    assert PlusOne()([small])[0] == np.float32(1) + small.astype(np.float32)[0] != ml_dtypes.bfloat16(1)


def test_mixtral_by_hand():
    cfg = read_config(SERVED["mixtral-8x7b"])
    entries = {(e.path, e.repeat, e.expert): e for e in array_sources(cfg)}
    gate_up = entries["segments.0.0.moe.experts.gate_up", 3, 5]
    assert [t.name for t in gate_up.tensors] == [
        "model.layers.3.block_sparse_moe.experts.5.w1.weight",
        "model.layers.3.block_sparse_moe.experts.5.w3.weight",
    ]
    assert {t.shape for t in gate_up.tensors} == {(14336, 4096)}
    bias = entries["segments.0.0.moe.bias", 0, None]
    assert not bias.tensors
    np.testing.assert_array_equal(bias.array([]), np.zeros(8))
    qkv = entries["segments.0.0.qkv", 31, None]
    assert [t.shape[0] for t in qkv.tensors] == [4096, 1024, 1024]
    parts = [np.full(t.shape, i, np.float16) for i, t in enumerate(qkv.tensors)]
    assert qkv.array(parts)[[0, 4095, 4096, 5119, 5120], 0].tolist() == [0, 0, 1, 1, 2]


def test_a_model_of_no_family_has_no_checkpoint():
    with pytest.raises(ConfigError, match=r"mixtral-shape is of family 'moejax', which has no published checkpoints"):
        list(array_sources(MIXTRAL))
