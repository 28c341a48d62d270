"""The time between two fronts, as an edge sees it: calls that the next one is to close, and deadlines that pass."""

import asyncio
from collections import deque
from collections.abc import Mapping

from serving.edges.connection import GONE_S
from serving.edges.stream_reader import StreamReader
from serving.errors import DeadlineExceeded
from serving.protocol import clock
from serving.protocol.request import Call

LATE_S = 1.0
"""Seconds after its deadline when a request ends at the edge, because no front is there to end it."""
KEPT_S = 2 * GONE_S
"""Seconds for which a call that was closed on a connection to another host is known: longer than such a connection can
seem to be there after its host has gone."""


class Absence:
    """`begin` when a front has gone, `end` when one is there. `readers` are the open streams of the edge; `remote` says
    whether fronts are on another host, where a message can be lost without a word."""

    def __init__(self, readers: Mapping[int, StreamReader], *, remote: bool) -> None:
        self._readers = readers
        self._remote = remote
        self._closed: deque[tuple[float, Call]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """No front is there: from now on a request ends LATE_S after its deadline."""
        self.end()
        self._timer = asyncio.get_running_loop().call_later(LATE_S, self._check)

    def end(self) -> None:
        """A front is there, which keeps the deadlines, or none is to come."""
        if self._timer is not None:
            self._timer.cancel()

    def closed(self, call: Call, *, connected: bool) -> None:
        """A call has been closed: the next front is to know it, if this one may not."""
        if connected:
            self._forget()
        if self._remote or not connected:
            self._closed.append((clock.now(), call))

    def to_close(self) -> list[Call]:
        """The calls that a front which is there now has to close: it knows them by their keys, and closes each once."""
        calls, now = [call for _, call in self._closed], clock.now()
        self._closed.clear()
        if self._remote:  # the new connection may be as dead as the one before
            self._closed.extend((now, call) for call in calls)
        return calls

    def _forget(self) -> None:
        while self._closed and self._closed[0][0] < clock.now() - KEPT_S:
            self._closed.popleft()

    def _check(self) -> None:
        for reader in self._readers.values():
            if reader.deadline is not None and reader.deadline + LATE_S <= clock.now():
                reader.fail(DeadlineExceeded("the deadline passed while no front was there."))
        self.begin()
