"""Laws of rotary embedding: distance alone counts, and each way of stretching keeps what its paper says it keeps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.attention_config import RopeScaling
from moejax.model.rope import frequencies, rope, rotate, scaled_frequencies
from tests.support.models import DENSE

CFG = dataclasses.replace(DENSE, d_head=64, rope_base=1e5)
SCALED = {
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_context=256),
    "yarn": RopeScaling(kind="yarn", factor=8.0, original_context=256),
    "longrope": RopeScaling(kind="longrope", factors=tuple(np.linspace(1, 8, 32).tolist())),
}


def heads(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 2, 64)).astype(np.float32)


def test_rope_keeps_lengths_and_depends_on_distance_alone():
    q, k = heads(0), heads(1)

    def score(p: int, s: int) -> np.ndarray:
        a, b = (rotate(x, jnp.array([i]), CFG) for x, i in ((q, p), (k, s)))
        return np.einsum("tnh,tnh->n", a, b)

    np.testing.assert_allclose(np.linalg.norm(rotate(q, jnp.array([9]), CFG)), np.linalg.norm(q), rtol=1e-5)
    np.testing.assert_allclose(score(3, 1), score(103, 101), atol=1e-3)
    np.testing.assert_array_equal(rotate(q, jnp.array([0]), CFG), q)


def test_what_is_not_rotated_stays():
    partial, q = dataclasses.replace(CFG, rope_dims=16), heads(0)
    out = np.asarray(rotate(q, jnp.array([7]), partial))
    np.testing.assert_array_equal(out[..., 16:], q[..., 16:])
    assert (out[..., :16] != q[..., :16]).any()


def test_a_part_of_the_pairs_of_whole_heads_is_rotated():
    scaling, q = RopeScaling(kind="proportional", factor=2.0, pairs=5), heads(0)
    partial = dataclasses.replace(CFG, rope_scaling=scaling)
    np.testing.assert_allclose(frequencies(partial)[:5], np.asarray(frequencies(CFG))[:5] / 2, rtol=1e-6)
    out = np.asarray(rotate(q, jnp.array([7]), partial))
    turned = (np.arange(64) % 32) < 5  # the two numbers of a pair are half a head apart
    np.testing.assert_array_equal(out[..., ~turned], q[..., ~turned])
    assert (out[..., turned] != q[..., turned]).all()


@pytest.mark.parametrize("kind", SCALED)
def test_stretched_frequencies_lie_between_the_plain_and_the_slowest(kind):
    plain, factor = np.asarray(frequencies(CFG)), 8.0 if kind != "linear" else 4.0
    slow = scaled_frequencies(CFG.rope_base, 64, SCALED[kind])
    assert (slow <= plain * 1.000001).all()
    assert (slow >= plain / factor * 0.999999).all()
    np.testing.assert_allclose(slow[-1], plain[-1] / factor, rtol=1e-5)
    if kind in ("llama3", "yarn"):  # turns many times within the original context
        np.testing.assert_allclose(slow[0], plain[0], rtol=1e-6)


@pytest.mark.parametrize(("context", "is_long"), [(64, False), (256, False), (257, True), (4096, True)])
def test_longrope_has_one_set_of_factors_for_a_served_context(context, is_long):
    long = tuple(np.linspace(2, 9, 32).tolist())
    scaling = dataclasses.replace(
        SCALED["longrope"], original_context=256, long_factors=long, magnitude=1.1, long_magnitude=1.3
    )
    cfg = dataclasses.replace(CFG, rope_scaling=scaling, max_context=context)
    expected = np.asarray(frequencies(dataclasses.replace(CFG, rope_scaling=None))) / (
        long if is_long else scaling.factors
    )
    np.testing.assert_allclose(frequencies(cfg), expected, rtol=1e-6)
    length = np.linalg.norm(rotate(heads(0), jnp.array([9]), cfg)) / np.linalg.norm(heads(0))
    np.testing.assert_allclose(length, 1.3 if is_long else 1.1, rtol=1e-5)
    assert cfg.original_context == (256 if is_long else 0)


def test_magnitude_multiplies_the_rotated_vector():
    once = rope(heads(0), jnp.array([5]), frequencies(CFG))
    np.testing.assert_allclose(rope(heads(0), jnp.array([5]), frequencies(CFG), 1.25), once * 1.25, rtol=1e-6)
