"""Waiting for something that happens soon; the limit ends a test that would hang, however slow the machine is."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Return once `condition()` is true. Raises TimeoutError after `within_s` seconds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)
