"""Laws of the name maps: every number of the parameter tree has its place in a checkpoint, once."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.families import is_unused, read_config, tensor_names
from moejax.manifest import is_expert, tensor_specs
from tests.moejax.families.test_reader import SERVED
from tests.moejax.models import MIXTRAL


@pytest.fixture(params=SERVED)
def cfg(request):
    return dataclasses.replace(read_config(SERVED[request.param]), n_layers=5, full_layers=(0, 2))


def test_every_array_of_the_tree_comes_from_somewhere_once(cfg):
    filled = Counter()
    for entry in tensor_names(cfg):
        filled[entry.path] += 1
        lead = (entry.repeat,) * (entry.repeat is not None) + (entry.expert,) * (entry.expert is not None)
        assert all(0 <= i < n for i, n in zip(lead, tensor_specs(cfg)[entry.path].shape, strict=False))
        assert (*tensor_specs(cfg)[entry.path].shape[: len(lead)], *entry.shape) == tensor_specs(cfg)[entry.path].shape
    for path, spec in tensor_specs(cfg).items():
        lead = spec.shape[: 2 if is_expert(path) else 1] if path.startswith("segments.") else ()
        assert filled[path] == np.prod(lead, dtype=int)


def test_transforms_keep_every_number_of_their_tensors(cfg):
    seen = set()
    for entry in tensor_names(cfg):
        if entry.tensors and entry.path not in seen:
            seen.add(entry.path)
            shapes = [t.shape if t.index is None else t.shape[1:] for t in entry.tensors]
            assert np.prod(entry.shape, dtype=int) <= sum(np.prod(s, dtype=int) for s in shapes)
            assert not any(is_unused(cfg, t.name) for t in entry.tensors)


def test_mixtral_by_hand():
    cfg = read_config(SERVED["mixtral-8x7b"])
    entries = {(e.path, e.repeat, e.expert): e for e in tensor_names(cfg)}
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
        list(tensor_names(MIXTRAL))
