"""The limits of the device: bytes per second of a copy within its memory, flops per second of a bfloat16 product."""

import jax
import jax.numpy as jnp

from benchmarks.gpu.chains import chained, each_ms
from benchmarks.gpu.rows import Limits


def measure(*, small: bool = False) -> Limits:
    """Both limits, the best of several sizes: copies of 1 and 4 GiB, square products of 4,096 and 8,192."""
    copies, sizes = ((1 << 22,), (256,)) if small else ((1 << 30, 1 << 32), (4096, 8192))
    times = 4 if small else 100
    rate = max(2 * size / _copy_s(size, times) for size in copies)
    return Limits(rate, max(2 * size**3 / _product_s(size, times // 4) for size in sizes))


def _copy_s(size: int, times: int) -> float:
    """Seconds in which `size` bytes are read and as many written. An addition keeps XLA from removing the copy."""
    program = chained(lambda x, i, _: x + i.astype(x.dtype), times)
    x = jnp.zeros(size // 4, jnp.float32)
    return each_ms(program, times, x, ()) / 1e3


def _product_s(size: int, times: int) -> float:
    """Seconds of a square product in bfloat16 with float32 sums. Two at a time: the carry of a loop is written where it
    was read, so that the result of a single product would be copied there."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)

    program = chained(lambda x, i, w: product(product(x, w), w), times)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    w = (jax.random.normal(jax.random.key(1), (size, size), jnp.float32) / size**0.5).astype(jnp.bfloat16)
    return each_ms(program, times, x, w) / 2 / 1e3
