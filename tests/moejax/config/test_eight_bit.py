"""Laws of published weights of eight bits: they are held in their own bits, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import eight_bit
from moejax.config.config_values import ConfigError
from moejax.config.packed_form import PackedForm
from tests.support.kernel_cases import EIGHT_BIT, planes, published_numbers


def shapes(tree) -> list:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("columns", [16, 83, 208])
@pytest.mark.parametrize("form", EIGHT_BIT)
def test_published_numbers_are_held_in_their_own_bits_and_as_many(form, columns):
    published = planes((2, 37, columns), EIGHT_BIT[form], seed=columns)
    held = eight_bit.from_published(published, EIGHT_BIT[form])
    assert held.numbers.tobytes() == published.codes.tobytes()
    expected = published_numbers(published, EIGHT_BIT[form])
    np.testing.assert_array_equal(np.asarray(eight_bit.dequantize(held)), expected)
    np.testing.assert_array_equal(jax.jit(eight_bit.dequantize)(jax.tree.map(jnp.asarray, held)), expected)
    shape = eight_bit.shape_of((2, 37, columns), EIGHT_BIT[form])
    assert shapes(held) == shapes(shape)
    assert jax.tree.structure(held) == jax.tree.structure(shape)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("form", EIGHT_BIT)
def test_scales_that_are_not_those_of_blocks_in_order_are_not_held(form, axis):
    published = planes((96, 120), EIGHT_BIT[form])
    alone = EIGHT_BIT[form].rows == 1 if axis == -2 else False  # each row has scales of its own
    moved = published._replace(scale=np.roll(published.scale, 1, axis=axis))
    same = np.array_equal(moved.scale, published.scale)
    assert (eight_bit.from_published(moved, EIGHT_BIT[form]) is None) == (not same and not alone)


def test_zero_points_that_eight_bits_do_not_hold_are_not_held():
    form = EIGHT_BIT["int8 by groups"]
    published = planes((3, 40), form)
    for zero, is_held in ((127, True), (128, False)):
        changed = published._replace(zero=np.full((3, 40), zero, np.int16))
        assert (eight_bit.from_published(changed, form) is not None) == is_held
    without = PackedForm(numbers="int8", scale="float16", group=20)
    assert eight_bit.from_published(published, without) is None
    middle = published._replace(zero=np.zeros((3, 40), np.int16))
    assert eight_bit.from_published(middle, without).zero is None


@pytest.mark.parametrize("form", EIGHT_BIT)
def test_scales_of_groups_are_those_of_their_columns(form):
    """Transforms that move columns take the latter."""
    whole, group = planes((37, 120), EIGHT_BIT[form]), EIGHT_BIT[form].group
    first = slice(None, None, group or 120)
    by_group = whole._replace(
        scale=whole.scale[:, first], zero=None if whole.zero is None else whole.zero[:, first], group=group
    )
    for spread in (whole, eight_bit.spread_over_columns(by_group)):
        held = eight_bit.from_published(spread, EIGHT_BIT[form])
        expected = eight_bit.from_published(by_group, EIGHT_BIT[form])
        jax.tree.map(np.testing.assert_array_equal, held, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": "e4m3"}, "scale is 'e4m3'; known for fp8 are 'float32'"),
        ({"rows": 0}, "rows is 0 and group 32"),
        ({"numbers": "4-bit"}, "scale is 'float32'; known for 4-bit are 'float16'"),
    ],
)
def test_a_form_that_is_none_is_refused_with_those_that_are(fields, message):
    with pytest.raises(ConfigError, match=message):
        PackedForm(**({"numbers": "fp8", "scale": "float32", "group": 32} | fields))
