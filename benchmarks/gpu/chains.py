"""Programs that do the same many times, so that what is timed is the device and not what sends it work."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from benchmarks.timing import median_ms

SAMPLES = 7


def chained(body: Callable[[jax.Array, jax.Array, Any], jax.Array], times: int) -> Callable[..., jax.Array]:
    """A program that runs `body(x, i, operands)` so many times, each on what the last one made. What is large comes as
    an operand: closed over, it would be a constant of the program."""

    @jax.jit
    def run(x: jax.Array, operands: Any) -> jax.Array:
        return lax.fori_loop(0, times, lambda i, x: body(x, i, operands), x)

    return run


def each_ms(program: Callable[..., jax.Array], times: int, x: jax.Array, operands: Any) -> float:
    """Median milliseconds of one of the `times` that a chained program does something."""
    return median_ms(lambda: jax.block_until_ready(program(x, operands)), SAMPLES) / times
