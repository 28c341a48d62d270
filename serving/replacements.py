"""Ranks that are started anew beside the steps, until they are part of the plan again."""

import asyncio
import time
from collections.abc import Callable, Iterable

from serving.events import EventLog
from serving.failover import Failover
from serving.links import RankLost, RankRefused

GATHER_S = 2.0
"""How long a rank that is ready to join waits for others that are about to be."""
RESTARTS = 5
"""Attempts to replace a rank before it is given up, each after twice the pause."""


class Replacements:
    """The replacements of one server that are on their way. `ready` hears of each that can join."""

    def __init__(self, failover: Failover, events: EventLog, ready: Callable[[], None]) -> None:
        self._failover = failover
        self._events = events
        self._ready = ready
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._entering: set[int] = set()
        self._postponed: set[int] = set()
        self._ready_since: float | None = None

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """What runs, or ran, to start ranks."""
        return tuple(self._starting.values())

    @property
    def may_join(self) -> bool:
        """Some are ready for a new generation in which all can serve, and nothing is gained by waiting for the
        others."""
        failover = self._failover
        if not failover.newcomers and not (failover.meshes.torn and failover.seated):
            return False
        coming = any(not task.done() for task in self.tasks)
        if coming and (self._ready_since is None or time.monotonic() - self._ready_since <= GATHER_S):
            return False
        return not failover.why_not({*failover.growing, *failover.newcomers})

    def is_starting(self, rank: int) -> bool:
        """Its process is being started."""
        return rank in self._starting and not self._starting[rank].done()

    def is_coming(self, rank: int) -> bool:
        """It is being started, or waits to join."""
        return self.is_starting(rank) or rank in self._failover.joining or rank in self._entering

    def start(self, rank: int) -> None:
        """Start a rank anew, unless it serves or is coming."""
        if rank not in self._failover.alive and not self.is_coming(rank):
            self._starting[rank] = asyncio.create_task(self._start(rank))

    def postpone(self, ranks: Iterable[int]) -> None:
        """Start these when `resume` is called."""
        self._postponed |= set(ranks)

    def resume(self) -> None:
        """Start those that were postponed."""
        for rank in self._postponed:
            self.start(rank)
        self._postponed.clear()

    def let_in(self, entering: Iterable[int] = ()) -> None:
        """Those that are ready wait no longer; these of them enter a new generation, until they `entered`."""
        self._ready_since, self._entering = None, set(entering)

    def entered(self) -> None:
        """Nobody is entering any more."""
        self._entering = set()

    def joined(self, rank: int) -> None:
        """It is part of the plan."""
        self._starting.pop(rank, None)

    async def _start(self, rank: int) -> None:
        for attempt in range(RESTARTS):
            try:
                await self._failover.replace(rank)
            except (RankLost, RankRefused, OSError) as error:
                self._events.add("restart_failed", self._failover.epoch, rank=rank, cause=str(error))
                await asyncio.sleep(2**attempt)
                continue
            self._ready_since = self._ready_since or time.monotonic()
            self._ready()
            return
