"""grpc.aio has one poller for the event loops of all tests in a process. It passes the last events of a channel on when
its test may be over and its loop closed, and the error would be that of whichever test runs then."""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

_call_soon_threadsafe = asyncio.BaseEventLoop.call_soon_threadsafe


def _unless_late(
    self: asyncio.BaseEventLoop,
    callback: Callable[..., object],
    *args: Any,
    context: contextvars.Context | None = None,
) -> asyncio.Handle:
    if self.is_closed() and callback.__module__ == "grpc._cython.cygrpc":
        return asyncio.Handle(callback, args, self, context)  # never run
    return _call_soon_threadsafe(self, callback, *args, context=context)


def drop_late_events() -> None:
    """Drop the events of grpc.aio for loops that are closed."""
    asyncio.BaseEventLoop.call_soon_threadsafe = _unless_late  # type: ignore[method-assign]
