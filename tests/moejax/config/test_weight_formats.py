"""Laws of the forms in which ranks hold weights: how far they are from the numbers, and that nothing else changes."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax.checkpoint.host_store import HostStore
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.packed_form import PackedForm, part_of
from moejax.config.parameter_counts import expert_bytes, parameter_count
from moejax.config.params import expert_positions, is_expert, is_spec, named_tensors, param_specs, tensor_specs
from moejax.config.weight_formats import (
    Int4,
    Int8,
    dequantize,
    is_matrix,
    is_scaled,
    to_weight_format,
    weight_bytes,
    weight_shape,
)
from moejax.runtime import steps
from moejax.runtime.live_weights import LiveArrays
from moejax.runtime.programs import ModelShape
from moejax.runtime.scrub import corrupt_slot, find_damaged_slots
from serving.engine.batch import ScheduledRequest, StepBucket
from serving.protocol.sampling import ResolvedSampling
from tests.support.models import DENSE, MIXTRAL, SHARED, lively_params, model_folder
from tests.support.stepping import PAGES, Stepper

NARROW = ["bfloat16", "int8", "int4"]
ROUNDING = {"bfloat16": 1e-4, "int8": 1e-3, "int4": 1e-3}
"""Of a step, against float32: sums in another order; with int8 and int4, rows of 16 bits in every dot."""


def in_form(cfg, form):
    return dataclasses.replace(cfg, weights=form)


def held(cfg, params):
    return jax.tree.map(
        lambda spec, values: to_weight_format(cfg, spec, values), param_specs(cfg), params, is_leaf=is_spec
    )


@pytest.mark.parametrize("cfg", [MIXTRAL, SHARED, DENSE], ids=lambda cfg: cfg.name)
@pytest.mark.parametrize("form", NARROW)
def test_matrices_are_near_what_they_were_and_all_else_is_the_same(cfg, form):
    cfg = in_form(cfg, form)
    params = lively_params(cfg)
    for (name, spec), values, leaf in zip(
        tensor_specs(cfg).items(),
        jax.tree.leaves(params),
        jax.tree.leaves(held(cfg, params), is_leaf=is_scaled),
        strict=True,
    ):
        assert jax.tree.map(lambda a: (a.shape, a.dtype), leaf) == jax.tree.map(
            lambda s: (s.shape, s.dtype), weight_shape(cfg, spec)
        )
        error = np.abs(np.asarray(dequantize(leaf), np.float32) - values)
        if not is_matrix(spec):
            assert not error.any(), name
        elif isinstance(leaf, Int8):
            assert (error <= 0.5001 * leaf.scale[..., None]).all(), name
        elif isinstance(leaf, Int4):
            step = np.repeat(np.abs(leaf.scale.astype(np.float32)) / 256, 32, axis=-1)[..., : leaf.columns]
            # Half a step, or a whole one where 8 steps upwards are wanted and 7 are there.
            assert (error <= 1.005 * step).all(), name
            assert error.mean() < 0.3 * step.mean()
        else:
            np.testing.assert_array_equal(leaf, values.astype(ml_dtypes.bfloat16))
    assert {n for n, s in tensor_specs(cfg).items() if not is_matrix(s) and len(s.shape) > 2} == {
        n for n in tensor_specs(cfg) if n.endswith("moe.router")
    }


def test_zero_rows_stay_zero_as_int8():
    spec = tensor_specs(MIXTRAL)["embed"]
    zeros = to_weight_format(in_form(MIXTRAL, "int8"), spec, np.zeros(spec.shape, np.float32))
    assert not np.asarray(dequantize(zeros)).any()
    assert np.isfinite(zeros.scale).all()


def test_bytes_are_those_of_the_form():
    experts = MIXTRAL.n_moe_layers * MIXTRAL.moe.experts
    assert weight_bytes(MIXTRAL, experts=True) == experts * expert_bytes(MIXTRAL)
    assert weight_bytes(MIXTRAL, experts=False) == 4 * parameter_count(MIXTRAL) - experts * expert_bytes(MIXTRAL)
    assert weight_bytes(in_form(MIXTRAL, "bfloat16"), experts=True) == experts * expert_bytes(MIXTRAL, 2)
    scales = sum(np.prod(s.shape[:-1]) for n, s in tensor_specs(MIXTRAL).items() if is_expert(n))
    assert weight_bytes(in_form(MIXTRAL, "int8"), experts=True) == experts * expert_bytes(MIXTRAL, 1) + 4 * scales
    wide = dataclasses.replace(MIXTRAL, d_model=64, moe=dataclasses.replace(MIXTRAL.moe, d_expert=192))
    assert weight_bytes(in_form(wide, "int4"), experts=True) == experts * expert_bytes(wide, 1) * 0.5625


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        (PackedForm(scale="e8m0", group=32), 4 + 8 / 32),
        (PackedForm(scale="e4m3", group=16), 4 + 8 / 16),
        (PackedForm(scale="bfloat16", group=32), 4 + 16 / 32),
        (PackedForm(scale="float16", group=128, zeros=True), 4 + (16 + 4) / 128),
        (PackedForm(scale="float16", group=32, zeros=True), 4 + (16 + 4) / 32),
        (PackedForm(numbers="fp8", scale="float32", group=128, rows=128), 8 + 32 / 128**2),
        (PackedForm(numbers="fp8", scale="float32", group=128, rows=64), 8 + 32 / 128**2),
        (PackedForm(numbers="fp8", scale="e8m0", group=32), 8 + 8 / 32),
        (PackedForm(numbers="fp8", scale="float32", group=0), 8),
        (PackedForm(numbers="int8", scale="float32", group=0), 8),
        (PackedForm(numbers="int8", scale="bfloat16", group=128, zeros=True), 8 + (16 + 8) / 128),
    ],
)
def test_ranks_hold_published_forms_in_at_most_a_twentieth_more_than_files_have(form, bits):
    wide = dataclasses.replace(MIXTRAL, d_model=1024, moe=dataclasses.replace(MIXTRAL.moe, d_expert=768))
    parts = {part_of(spec.axes) for spec in tensor_specs(wide).values() if "expert" in spec.axes}
    cfg = wide.with_packed(dataclasses.replace(form, parts=tuple(sorted(parts))))
    published = wide.n_moe_layers * wide.moe.experts * expert_bytes(wide, 1) * bits / 8
    assert 1 <= weight_bytes(cfg, experts=True) / published <= 1.05
    assert ModelConfig.from_json(cfg.to_json()) == cfg
    with pytest.raises(ValueError, match="published in another form"):
        to_weight_format(cfg, tensor_specs(wide)[experts_down(wide)], np.zeros((4, 4), np.float32))


def experts_down(cfg):
    return next(name for name in tensor_specs(cfg) if name.endswith("experts.down"))


def test_a_form_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="'int3'; known are 'float32', 'bfloat16', 'int8', 'int4', 'published-int4'"):
        in_form(MIXTRAL, "int3")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("form", NARROW)
def test_a_step_computes_with_the_numbers_the_form_stands_for(form, ranks):
    cfg = in_form(MIXTRAL, form)
    params = held(cfg, lively_params(cfg))
    plain = jax.tree.map(lambda leaf: np.asarray(dequantize(leaf), np.float32), params, is_leaf=is_scaled)
    slots = -(-cfg.moe.experts // ranks)
    table = np.arange(ranks * slots) % cfg.moe.experts
    bucket = StepBucket(2, 1)
    work = {
        0: (
            ScheduledRequest(
                request_id="a",
                start=0,
                tokens=tuple(range(3, 23)),
                pages=(0,),
                samples=True,
                sampling=ResolvedSampling(max_tokens=1, seed=0, temperature=0.0),
            ),
        )
    }
    outcomes = [
        Stepper(each, weights, ranks, slots, table).run(bucket, work)
        for each, weights in ((cfg, params), (in_form(cfg, "float32"), plain))
    ]
    rows = slice(bucket.decode, bucket.decode + 20)
    np.testing.assert_allclose(outcomes[0].hidden[rows], outcomes[1].hidden[rows], rtol=0, atol=ROUNDING[form])
    np.testing.assert_array_equal(outcomes[0].expert_load, outcomes[1].expert_load)


@pytest.mark.parametrize("form", NARROW)
def test_spoilt_weights_are_found_and_read_again_in_any_form(tmp_path, form):
    cfg = in_form(MIXTRAL, form)
    model_folder(tmp_path / "m", MIXTRAL)
    shape = ModelShape(cfg=cfg, buckets=(), page_size=8, pages=PAGES)
    programs = type("Programs", (), {"fills": dict.fromkeys(expert_positions(cfg), steps.run_fill)})()
    device = jax.devices()[0]
    arrays = LiveArrays(shape, HostStore.open(tmp_path / "m"))
    arrays.enter_device(device)
    slots = np.tile(np.arange(cfg.moe.experts, dtype=np.int32), (cfg.n_moe_layers, 1))
    arrays.fill(slots, programs, device)
    assert not find_damaged_slots(arrays, 0, 0)
    assert not arrays.damaged()
    before = jax.tree.map(np.array, arrays.expert(1, 2))
    for nan in (False, True):
        corrupt_slot(arrays, 1, 2, programs, device, nan=nan)
        assert find_damaged_slots(arrays, 0, 0) == [(1, 2, 2)]
        assert arrays.fill(slots, programs, device).read == 1
        jax.tree.map(np.testing.assert_array_equal, before, arrays.expert(1, 2))
    assert set(named_tensors(arrays.head)) == {"weight.numbers", "weight.scale"} if form == "int8" else {"weight"}
