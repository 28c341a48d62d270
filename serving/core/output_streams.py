"""What becomes of requests, told to whoever reads it: to the ledger first, then to each reader's queue."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from serving.engine import Output
from serving.errors import MoejaxError
from serving.ledger import Item, Ledger
from serving.request import Finished, Scored, Token


class Delivery:
    """The readers of a server's requests, and counts of what they were told."""

    def __init__(self, ledger: Ledger, abandoned: Callable[[str], None]) -> None:
        self.finished = 0
        self.failed = 0
        self.tokens = 0
        self.degraded = 0
        """Requests that ended with tokens made while experts were masked."""
        self._ledger = ledger
        self._abandoned = abandoned
        self._readers: dict[str, list[asyncio.Queue[Item]]] = {}
        self._degraded: set[str] = set()

    @property
    def awaited(self) -> tuple[str, ...]:
        """Requests that are read and have not ended."""
        return tuple(self._readers)

    async def read(self, request_id: str, past: Iterable[Item]) -> AsyncGenerator[Scored | Token | Finished, None]:
        """What was told of a request, then what is told of it now. It is abandoned when its last reader leaves."""
        queue: asyncio.Queue[Item] = asyncio.Queue()
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
            if not readers and self._readers.get(request_id) is readers:
                del self._readers[request_id]
                self._abandoned(request_id)

    def tell(self, outputs: Iterable[Output]) -> None:
        """Note these, then let their readers have them."""
        outputs = tuple(outputs)
        if self._ledger.keeps and outputs:
            self._ledger.note(outputs)
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
