"""Time of what runs on a device, without that of sending it there."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def chained(body: Callable[[jax.Array, jax.Array, Any], jax.Array], times: int) -> Callable[..., jax.Array]:
    """A program that runs `body(x, i, operands)` so many times, each on what the last one made. What is large comes as
    an operand: closed over, it would be a constant of the program."""

    @jax.jit
    def run(x: jax.Array, operands: Any) -> jax.Array:
        return lax.fori_loop(0, times, lambda i, x: body(x, i, operands), x)

    return run


def median_ms(run: Callable[[], Any], *, times: int = 1, samples: int = 7) -> float:
    """Median milliseconds of one of the `times` that `run` does something, which it waits for; the first is not
    counted."""
    run()
    took = []
    for _ in range(samples):
        began = time.perf_counter()
        run()
        took.append(1e3 * (time.perf_counter() - began) / times)
    return statistics.median(took)
