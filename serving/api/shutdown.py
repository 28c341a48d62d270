"""Ends the streams that would otherwise never end, so that a server that stops need not wait for them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from serving.errors import Draining

T = TypeVar("T")


class Shutdown:
    """The state of one server: running, or shutting down once `begin` is called."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def begin(self) -> None:
        """End every stream that goes through `until`."""
        self._event.set()

    async def until(self, items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """The items as they come. Raises Draining when the server shuts down before the end."""
        stopped = asyncio.ensure_future(self._event.wait())
        step: asyncio.Future[T] | None = None
        try:
            while True:
                step = asyncio.ensure_future(anext(items))
                await asyncio.wait({step, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    raise Draining("the server is shutting down.")
                try:
                    item = step.result()
                except StopAsyncIteration:
                    return
                yield item
        finally:
            for task in (stopped, step):
                if task is not None and not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            if isinstance(items, AsyncGenerator):
                await items.aclose()
