"""Laws of the layers: they compute what their papers say, and no bit of a row depends on its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.layers import geglu, ordered_sum, rms_norm, row_dot, swiglu

# (out, in) of the weights of tiny and of smollm2-moe: qkv, out, gate-up, down, shared, router, head.
TINY = [(256, 128), (128, 128), (512, 128), (128, 256), (8, 128), (2048, 128)]
SMOLLM2 = [(960, 576), (576, 576), (3072, 576), (576, 1536), (1024, 576), (576, 512), (256, 576), (576, 128)]
SMOLLM2 += [(8, 576)]
ROWS = (1, 2, 3, 8, 31, 32, 33, 64, 100, 129)
# Rounding of float32 sums of up to 1536 products of standard normals, against float64.
ROUNDING = 2e-4


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", TINY + SMOLLM2, ids=str)
def test_a_row_of_a_dot_has_the_same_bits_in_any_batch(shape):
    dot = jax.jit(row_dot)
    x, w = normal(max(ROWS), shape[1]), normal(*shape, seed=1)
    alone = np.concatenate([np.asarray(dot(x[i : i + 1], w)) for i in (0, 1, 2)])
    for rows in ROWS:
        whole = np.asarray(dot(x[:rows], w))
        np.testing.assert_array_equal(whole[:3], alone[:rows][:3])
        if rows > 3:
            moved = np.asarray(dot(np.roll(x[:rows], 1, axis=0), w))
            np.testing.assert_array_equal(moved[1:4], alone)


def test_a_dot_is_the_product_with_the_transposed_weight():
    x, w = normal(5, 576), normal(40, 576, seed=1)
    np.testing.assert_allclose(row_dot(x, w), x.astype(np.float64) @ w.T.astype(np.float64), atol=ROUNDING)


@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 96, 128, 576, 1000])
def test_an_ordered_sum_is_the_sum_whatever_stands_around_it(size):
    x = normal(40, size)
    total = jax.jit(ordered_sum)
    np.testing.assert_allclose(total(x), x.astype(np.float64).sum(-1), atol=ROUNDING)
    np.testing.assert_array_equal(np.asarray(total(x))[:2], np.asarray(total(x[:2])))


def test_rms_norm_leaves_a_mean_square_of_one():
    x = 7 * normal(6, 128)
    y = np.asarray(rms_norm(x, jnp.ones(128), 1e-5))
    np.testing.assert_allclose(np.square(y).mean(-1), 1, rtol=1e-4)
    np.testing.assert_allclose(rms_norm(x, jnp.full(128, 3.0), 1e-5), 3 * y, rtol=1e-6)


def test_geglu_is_down_of_gelu_of_gate_times_up():
    x, gate_up, down = normal(4, 16), normal(24, 16, seed=1), normal(16, 12, seed=2)
    gate, up = np.split(x.astype(np.float64) @ gate_up.T, 2, axis=1)
    gelu = gate / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    np.testing.assert_allclose(geglu(x, gate_up, down), (gelu * up) @ down.T, rtol=1e-4, atol=1e-4)


def test_swiglu_is_down_of_silu_of_gate_times_up():
    x, gate_up, down = normal(4, 16), normal(24, 16, seed=1), normal(16, 12, seed=2)
    gate, up = np.split(x.astype(np.float64) @ gate_up.T, 2, axis=1)
    np.testing.assert_allclose(
        swiglu(x, gate_up, down), (gate / (1 + np.exp(-gate)) * up) @ down.T, rtol=1e-4, atol=1e-4
    )
