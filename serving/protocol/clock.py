"""The clocks of a front. The rooms that decide and act read no other: engine, executor, recovery and core."""

import asyncio
import time


def now() -> float:
    """Seconds on the clock of the running event loop, which asyncio's time-outs use too: the monotonic clock, unless a
    simulator runs the loop. Outside a loop the monotonic clock."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


def wall() -> float:
    """Seconds since 1970, for what outlives this process or is shown to people."""
    return time.time()
