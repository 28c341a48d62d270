"""Time of what is done again and again."""

import statistics
import time
from collections.abc import Callable


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """Milliseconds, of `rounds` runs after a first."""
    took = []
    for turn in range(rounds + 1):
        began = time.perf_counter()
        run()
        if turn:
            took.append(1e3 * (time.perf_counter() - began))
    return statistics.median(took)
