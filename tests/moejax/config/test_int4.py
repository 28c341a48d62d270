"""Laws of int4: what is int4 already stays in every bit, and shards end where groups do."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import int4
from moejax.config.config_values import ConfigError
from tests.support.models import MIXTRAL, SHARED

TYPES = [np.float16, ml_dtypes.bfloat16]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES), st.sampled_from([32, 64, 128]), st.sampled_from([1, 3, 5]))
def test_numbers_that_are_int4_stay_what_they_are(seed, dtype, group, groups):
    draw = np.random.default_rng(seed)
    scale = np.exp(draw.uniform(-12, 4, (6, groups))).astype(dtype).astype(np.float32)
    steps = draw.integers(-8, 8, (6, groups, group)) // draw.integers(1, 9, (6, groups, 1))
    values = (steps * scale[..., None]).reshape(6, groups * group).astype(np.float32)
    assert int4.is_exact(values)
    for held in (int4.keep(values), int4.quantize(values)):
        np.testing.assert_array_equal(np.asarray(int4.dequantize(held)), values)


def test_numbers_that_are_none_are_refused_by_shape():
    values = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    assert not int4.is_exact(values)
    with pytest.raises(ValueError, match=r"shape \(5, 96\) are not int4"):
        int4.keep(values)


@pytest.mark.parametrize("wrong", [2100.0, -1e4, np.inf, np.nan])
def test_a_weight_beyond_the_scales_of_16_bits_is_refused_with_its_value(wrong):
    values = np.zeros((9, 64), np.float32)
    values[7, 40] = 2047
    assert np.isfinite(np.asarray(int4.dequantize(int4.quantize(values)))).all()
    values[7, 41] = wrong
    with pytest.raises(ValueError, match=f"a weight is {wrong:g}; int4 weights are at most 2,047"):
        int4.quantize(values)


def test_zeros_and_columns_beyond_whole_groups_stay():
    values = np.zeros((3, 37), np.float32)
    values[1, 36] = 0.25
    held = int4.quantize(values)
    assert (held.numbers.shape, held.scale.shape) == ((3, 16), (3, 2))
    np.testing.assert_array_equal(np.asarray(int4.dequantize(held)), values)


def test_shards_that_end_within_a_group_are_refused_with_both_widths():
    cfg = dataclasses.replace(MIXTRAL, weights="int4", n_heads=4, n_kv_heads=2, d_head=8)
    with pytest.raises(ConfigError, match=r"attention \(tensor 2\) of .* are 16 inputs wide, .* groups of 32"):
        cfg.tp_shard(2)
    assert dataclasses.replace(cfg, d_head=16).tp_shard(2).tensor == 2
    assert dataclasses.replace(cfg, weights="int8").tp_shard(2).tensor == 2
    with pytest.raises(ConfigError, match=r"dense layers \(8\) of .* are 8 inputs wide, .* groups of 32"):
        dataclasses.replace(SHARED, shard_dense=True, weights="int4")
