"""What happened, in order, for whoever watches."""

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Mapping

from serving.status import Event

KEPT = 1000
"""Events that a late watcher can still get."""


class EventLog:
    """The last events and those to come. Used from one event loop."""

    def __init__(self) -> None:
        self._events: collections.deque[Event] = collections.deque(maxlen=KEPT)
        self._more = asyncio.Event()
        self._sequence = 0

    def add(
        self,
        kind: str,
        epoch: int,
        *,
        rank: int | None = None,
        cause: str = "",
        phases: Mapping[str, float] | None = None,
        message: str = "",
    ) -> Event:
        """Note an event now."""
        self._sequence += 1
        event = Event(
            sequence=self._sequence,
            time=time.time(),
            kind=kind,
            epoch=max(epoch, 0),
            rank=rank,
            cause=cause,
            phases=dict(phases or {}),
            message=message,
        )
        self._events.append(event)
        self._more.set()
        self._more = asyncio.Event()
        return event

    def past(self) -> tuple[Event, ...]:
        """The events kept."""
        return tuple(self._events)

    async def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """Events above `after`: those kept, then each as it comes."""
        while True:
            more = self._more
            for event in [e for e in self._events if e.sequence > after]:
                after = event.sequence
                yield event
            if self._sequence <= after:
                await more.wait()
