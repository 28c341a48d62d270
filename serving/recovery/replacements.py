"""Replacements of lost ranks: their processes are started beside the steps."""

import asyncio
from collections.abc import Awaitable, Callable

from serving.executor.rank_errors import CommandFailed, RankLost
from serving.protocol.events import EventKind, EventLog
from serving.recovery.membership_events import StartAbandoned, Starting, Wanted
from serving.recovery.recovery_state import RecoveryState

MAX_RESTARTS = 5
"""Attempts to start a rank before it is given up; the pause after each is twice the one before."""


class Replacements:
    """Starts the ranks that the membership wants started. `start_rank` starts the process of one until it is READY, and
    raises RankLost or CommandFailed."""

    def __init__(self, state: RecoveryState, events: EventLog, start_rank: Callable[[int], Awaitable[None]]) -> None:
        self._state = state
        self._events = events
        self._start_rank = start_rank
        self._starting: dict[int, asyncio.Task[None]] = {}

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """The tasks that start ranks, or have done so."""
        return tuple(self._starting.values())

    def start(self, rank: int) -> None:
        """Start a rank, unless it serves or is on its way; a rank that was taken out comes back. One that the plan in
        force counts on is started once that is no longer so (`start_wanted`)."""
        self._state.record(Wanted(rank))
        membership = self._state.membership
        if rank in membership.wanted and membership.can_start(rank):
            self._begin(rank)

    def start_wanted(self) -> None:
        """Start the ranks that are wanted and that the plan in force does not count on."""
        membership = self._state.membership
        for rank in sorted(membership.wanted):
            if membership.can_start(rank):
                self._begin(rank)

    def on_joined(self, rank: int) -> None:
        """A rank serves."""
        self._starting.pop(rank, None)

    def _begin(self, rank: int) -> None:
        self._state.record(Starting(rank))
        self._starting[rank] = asyncio.create_task(self._start(rank))

    async def _start(self, rank: int) -> None:
        try:
            for attempt in range(MAX_RESTARTS):
                try:
                    await self._start_rank(rank)
                except (RankLost, CommandFailed, OSError) as error:
                    epoch = self._state.membership.epoch
                    self._events.emit(EventKind.RESTART_FAILED, epoch, rank=rank, cause=str(error))
                    await asyncio.sleep(2**attempt)
                    continue
                return
        finally:
            self._state.record(StartAbandoned(rank))
