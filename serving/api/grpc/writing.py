"""Writing to a client that may not read."""

import asyncio
from typing import Any

from serving.errors import DeadlineExceeded


async def write(context: Any, message: Any, limit_s: float) -> None:
    """Write one message of a stream, waiting for the client's flow control window.

    Raises DeadlineExceeded when the client reads nothing for `limit_s` seconds (--slow-client-s).
    """
    try:
        async with asyncio.timeout(limit_s):
            await context.write(message)
    except TimeoutError:
        raise DeadlineExceeded(f"the client read nothing for {limit_s:g} s (--slow-client-s).") from None
