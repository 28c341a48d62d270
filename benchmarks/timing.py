"""Measures the duration of a function that is called repeatedly."""

import statistics
import time
from collections.abc import Callable


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """The median duration in milliseconds of `rounds` runs, after one run that does not count."""
    took = []
    for turn in range(rounds + 1):
        began = time.perf_counter()
        run()
        if turn:
            took.append(1e3 * (time.perf_counter() - began))
    return statistics.median(took)
