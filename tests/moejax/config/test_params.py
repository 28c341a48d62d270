"""Laws of the parameter table: every other view of the parameters agrees with it."""

import functools

import jax
import pytest

from moejax.config.parameter_counts import expert_bytes, parameter_count
from moejax.config.params import init_params, is_spec, param_specs
from tests.support.models import ALL, DENSE, MIXTRAL, SHARED


@pytest.mark.parametrize("cfg", ALL, ids=lambda c: c.name)
def test_initial_parameters_have_the_shapes_of_the_table(cfg):
    specs = jax.tree.map(lambda s: s.shape, param_specs(cfg), is_leaf=is_spec)
    made = jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))
    assert specs == jax.tree.map(lambda a: a.shape, made)
    assert parameter_count(cfg) == sum(a.size for a in jax.tree.leaves(made))


@pytest.mark.parametrize("cfg", ALL, ids=lambda c: c.name)
def test_every_axis_has_a_name(cfg):
    for spec in jax.tree.leaves(param_specs(cfg), is_leaf=is_spec):
        assert len(spec.axes) == len(spec.shape)


def test_a_layer_is_dense_or_routed():
    for cfg in ALL:
        for (pattern, _), layers in zip(cfg.segments, param_specs(cfg).segments, strict=True):
            for kind, layer in zip(pattern, layers, strict=True):
                assert (layer.ffn is None) == (kind == "moe")
                assert (layer.moe is None) == (kind == "dense")


def test_bytes_of_an_expert_are_those_of_its_leaves():
    for cfg in (MIXTRAL, SHARED):
        experts = [layer.moe.experts for s in param_specs(cfg).segments for layer in s if layer.moe]
        for e in experts:
            per_expert = (e.gate_up.size + e.down.size) // (e.down.shape[0] * cfg.moe.experts)
            assert expert_bytes(cfg) == 4 * per_expert
            assert expert_bytes(cfg, itemsize=2) == 2 * per_expert
    assert expert_bytes(DENSE) == 0


def test_a_head_exists_only_when_it_is_not_the_embedding():
    assert param_specs(SHARED).head is None
    assert param_specs(MIXTRAL).head.shape == (MIXTRAL.vocab_size, MIXTRAL.d_model)
