"""Laws of int4: what is int4 already stays in every bit, and shards end where groups do."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import int4
from moejax.config.config_values import ConfigError
from tests.support.kernel_cases import PACKED, planes, published_numbers
from tests.support.models import MIXTRAL, SHARED

TYPES = [np.float16, ml_dtypes.bfloat16]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES), st.sampled_from([32, 64, 128]), st.sampled_from([1, 3, 5]))
def test_numbers_that_are_int4_stay_what_they_are(seed, dtype, group, groups):
    draw = np.random.default_rng(seed)
    scale = np.exp(draw.uniform(-12, 4, (6, groups))).astype(dtype).astype(np.float32)
    steps = draw.integers(-8, 8, (6, groups, group)) // draw.integers(1, 9, (6, groups, 1))
    values = (steps * scale[..., None]).reshape(6, groups * group).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(int4.dequantize(int4.quantize(values))), values)


@pytest.mark.parametrize("columns", [16, 64, 208])
@pytest.mark.parametrize("form", PACKED)
def test_published_numbers_are_held_in_their_own_bits_and_as_many(form, columns):
    if form == "nvfp4" or columns > 16:
        published = planes((2, 3, columns), PACKED[form], seed=columns)
        held = int4.from_published(published, PACKED[form])
        np.testing.assert_array_equal(np.asarray(int4.dequantize(held)), published_numbers(published))
        shape = int4.shape_of((2, 3, columns), PACKED[form])
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), held) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), shape
        )


@pytest.mark.parametrize("form", PACKED)
def test_scales_that_are_not_those_of_groups_in_order_are_not_held(form):
    published = planes((3, 128), PACKED[form])
    moved = published._replace(scale=np.roll(published.scale, 1, axis=-1))
    if PACKED[form].group:
        assert int4.from_published(moved, PACKED[form]) is None
    zero = np.full((3, 128), 7, np.uint8)
    zero[:, 40:] = 9
    if form != "mxfp4" and form != "nvfp4":
        assert int4.from_published(published._replace(zero=zero), PACKED[form]) is None


def test_every_published_scale_of_16_bits_is_held():
    published = planes((3, 128), PACKED["awq"])
    largest, least = np.finfo(np.float16).max, np.finfo(np.float16).smallest_subnormal
    for scale in (256, largest, -largest, least, 0.1):
        scaled = published._replace(scale=np.full((3, 128), scale, np.float16))
        held = int4.from_published(scaled, PACKED["awq"])
        np.testing.assert_array_equal(np.asarray(int4.dequantize(held)), published_numbers(scaled))


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
