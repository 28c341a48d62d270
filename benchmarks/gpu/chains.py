"""Programs that repeat the same work, so that the device is timed and not the host that sends it work."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from benchmarks.timing import median_ms

SAMPLES = 7


def chained(body: Callable[[jax.Array, jax.Array, Any], jax.Array], times: int) -> Callable[..., jax.Array]:
    """A program that runs `body(x, i, operands)` `times` times, each on the result of the one before. Large arrays are
    operands: closed over, they would be constants of the program."""

    @jax.jit
    def run(x: jax.Array, operands: Any) -> jax.Array:
        return lax.fori_loop(0, times, lambda i, x: body(x, i, operands), x)

    return run


def each_ms(program: Callable[..., jax.Array], times: int, x: jax.Array, operands: Any) -> float:
    """Median milliseconds of one of the `times` bodies of a chained program."""
    return median_ms(lambda: jax.block_until_ready(program(x, operands)), SAMPLES) / times
