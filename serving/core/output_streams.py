"""Streams of tokens to their readers: each item goes to the request log first, then to the queue of each reader."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from serving.core.call_records import StreamItem
from serving.core.request_log import RequestLog
from serving.engine.state import Output
from serving.errors import MoejaxError
from serving.protocol.request import Finished, Scored, Token


class OutputStreams:
    """The readers of all requests of a server, and counts of what was sent to them."""

    def __init__(self, request_log: RequestLog, on_abandoned: Callable[[str], None]) -> None:
        self.finished = 0
        self.failed = 0
        self.tokens = 0
        self.degraded = 0
        """Number of requests that ended with tokens computed while experts were masked."""
        self._request_log = request_log
        self.on_abandoned = on_abandoned
        """Called with the id of a request whose last reader has left before its end."""
        self._readers: dict[str, list[asyncio.Queue[StreamItem]]] = {}
        self._degraded: set[str] = set()
        self._first_steps: dict[str, float] = {}

    @property
    def open_requests(self) -> tuple[str, ...]:
        """Ids of the requests that have readers and have not ended."""
        return tuple(self._readers)

    def record_step(self, request_ids: Iterable[str], now: float) -> None:
        """A step with these requests has been made at `now`."""
        for request_id in request_ids:
            if request_id in self._readers:
                self._first_steps.setdefault(request_id, now)

    def first_step_at(self, request_id: str) -> float | None:
        """When the first step with a request that is being read was made, in seconds of the front's clock."""
        return self._first_steps.get(request_id)

    async def read(
        self, request_id: str, past: Iterable[StreamItem]
    ) -> AsyncGenerator[Scored | Token | Finished, None]:
        """Yield the `past` items of a request, then each further item until its end. Raises MoejaxError if the request
        ends with one. `on_abandoned` gets the id when the last reader leaves before the end."""
        queue: asyncio.Queue[StreamItem] = asyncio.Queue()
        for item in past:
            queue.put_nowait(item)
        readers = self._readers.setdefault(request_id, [])
        readers.append(queue)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, MoejaxError):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            readers.remove(queue)
            if not readers:
                self._first_steps.pop(request_id, None)
            if not readers and self._readers.get(request_id) is readers:
                del self._readers[request_id]
                self.on_abandoned(request_id)

    def send(self, outputs: Iterable[Output]) -> None:
        """Record the outputs of a step, then send them to their readers."""
        outputs = tuple(outputs)
        if self._request_log.enabled and outputs:
            self._request_log.record(outputs)
        for request_id, item in outputs:
            readers = list(self._readers.get(request_id, ()))
            if isinstance(item, Token):
                self.tokens += 1
                if item.degraded:
                    self._degraded.add(request_id)
            elif not isinstance(item, Scored):
                self._readers.pop(request_id, None)
                self.degraded += request_id in self._degraded
                self._degraded.discard(request_id)
                self.finished += isinstance(item, Finished)
                self.failed += isinstance(item, MoejaxError)
            for queue in readers:
                queue.put_nowait(item)
