"""Events of a server: their kinds, and the log that watchers read."""

import asyncio
import collections
import dataclasses
import enum
from collections.abc import AsyncIterator, Mapping
from typing import Self

from serving.protocol.clock import wall

RETAINED_EVENTS = 1000
"""Events that a late watcher can still get."""


class Severity(enum.StrEnum):
    """How an event is shown: something failed, works again, or neither."""

    GOOD = "good"
    BAD = "bad"
    NEUTRAL = "neutral"


class EventKind(enum.StrEnum):
    """The kinds of events a server emits, each with its severity. The values are their names on the wire."""

    _value_: str
    severity: Severity

    def __new__(cls, value: str, severity: Severity = Severity.NEUTRAL) -> Self:
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.severity = severity
        return kind

    # of the server
    READY = "ready", Severity.GOOD
    """Requests are served."""
    DRAINING = "draining"
    """The server shuts down and takes no new requests."""
    PAUSED = "paused"
    """An operator paused it: no step runs."""
    RESUMED = "resumed"
    """Steps run again."""
    EDGE_STARTED = "edge_started", Severity.GOOD
    """Clients can connect to a new edge."""
    EDGE_REPLACED = "edge_replaced"
    """An edge has ended because one with other code has taken its place."""
    EDGE_ENDED = "edge_ended"
    """An edge on another host has ended on request, and has left no call open."""
    EDGE_LOST = "edge_lost", Severity.BAD
    """An edge has gone; its calls run on and can be resumed at another one."""

    # of recoveries
    RANK_LOST = "rank_lost", Severity.BAD
    """A rank died, hung or was declared dead."""
    RECOVERED = "recovered", Severity.GOOD
    """The first step after a loss has run."""
    NO_CAPACITY = "no_capacity", Severity.BAD
    """No plan serves with the ranks that are left."""
    BROKEN = "broken", Severity.BAD
    """A command failed on a rank; a new generation is formed."""
    INTERRUPTED = "interrupted", Severity.BAD
    """A rank died while something between two steps was under way."""
    STEP_FAILED = "step_failed", Severity.BAD
    """A step failed on a rank that lives."""
    REJOINED = "rejoined", Severity.GOOD
    """A replacement serves."""
    REJOIN_FAILED = "rejoin_failed", Severity.BAD
    """Ranks could not join; it is tried again."""
    RESTART_FAILED = "restart_failed", Severity.BAD
    """A replacement process did not start."""
    LATTICE_READY = "lattice_ready", Severity.GOOD
    """The mesh for every planned loss is connected."""
    COORDINATOR_LOST = "coordinator_lost", Severity.BAD
    """The coordination service of a generation failed."""
    CACHE_RESTORED = "cache_restored", Severity.GOOD
    """KV entries of a lost rank were restored from replicas."""
    NOT_RESTORED = "not_restored", Severity.BAD
    """A request's KV entries could not be restored; they are computed again."""
    UNPROTECTED = "unprotected", Severity.BAD
    """The KV cache of ranks is not replicated, and why."""
    SUSPECTED = "suspected", Severity.BAD
    """A rank failed of itself in a step: the requests of the step run alone until it is known why."""
    CLEARED = "cleared", Severity.GOOD
    """Suspected requests got past the place where the rank failed."""
    CONVICTED = "convicted", Severity.BAD
    """A request was ended, because ranks fail whenever it runs."""

    # of planned changes
    LEAVING = "leaving"
    """A rank hands over its requests."""
    DRAINED = "drained"
    """A rank has left."""
    DRAIN_FAILED = "drain_failed", Severity.BAD
    """A rank could not leave."""

    UPGRADING = "upgrading"
    """An upgrade replaces the processes named by processes that run other code."""
    UPGRADED = "upgraded", Severity.GOOD
    """All processes run the new code."""
    CANARY_FAILED = "canary_failed", Severity.BAD
    """A rank with new code did not answer as the others do; it was ended before it computed for a client."""
    UPGRADE_FAILED = "upgrade_failed", Severity.BAD
    """The new code could not start or answered otherwise; processes go back to the former code."""
    ROLLED_BACK = "rolled_back", Severity.GOOD
    """All processes run the former code again."""

    # of single ranks
    DEVICE_ERROR = "device_error", Severity.BAD
    """A device reported an error, or a report could not be read."""
    STARVED = "starved"
    """A rank is late because its process waits for a processor; it is given longer."""
    SLOW = "slow", Severity.BAD
    """A rank is slower than the others."""
    PACE_RECOVERED = "pace_recovered", Severity.GOOD
    """The rank is as quick as the others again."""

    # of weights
    POISONED = "poisoned", Severity.BAD
    """A step had values that are not finite; its tokens were not sent."""
    DAMAGED = "damaged", Severity.BAD
    """Weights on a rank differ from the store."""
    RESTORED = "restored", Severity.GOOD
    """Damaged weights were loaded again."""
    MASKED = "masked", Severity.BAD
    """Experts without a copy are masked."""
    HEALED = "healed", Severity.GOOD
    """Masked experts were loaded."""
    REBALANCED = "rebalanced", Severity.GOOD
    """Experts have moved to other ranks because of the load, or need not; the share of the hottest rank before and
    after."""
    REBALANCE_FAILED = "rebalance_failed", Severity.BAD
    """Experts are not moved, although a rank is hot."""
    STORE_UNREADABLE = "store_unreadable", Severity.BAD
    """The host's store could not give experts."""
    WEIGHTS_LOADING = "weights_loading"
    """Ranks load other weights into host memory, beside the steps."""
    WEIGHTS_SWITCHED = "weights_switched", Severity.GOOD
    """All ranks have other weights, from this epoch on."""
    WEIGHTS_REFUSED = "weights_refused", Severity.BAD
    """Other weights could not be loaded; those in force stay."""
    PARITY_READY = "parity_ready", Severity.GOOD
    """All parity groups of the plan are made."""
    REBUILT = "rebuilt", Severity.GOOD
    """Lost experts were rebuilt from parity."""
    REBUILD_FAILED = "rebuild_failed", Severity.BAD
    """Lost experts could not be rebuilt; they are read from the store."""

    # of the journal
    RESTORED_CALLS = "restored_calls", Severity.GOOD
    """Calls of an earlier front go on."""
    JOURNAL_FAILED = "journal_failed", Severity.BAD
    """The journal cannot be written."""
    JOURNAL_BACK = "journal_back", Severity.GOOD
    """The journal can be written again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """An event of a server. `time` is in seconds since the epoch, `phases` in milliseconds by phase (detect, fence,
    plan, adopt, resume ...). `kind` is an EventKind; a client may read one that only a newer server knows, with the
    severity that the server gives it."""

    sequence: int
    time: float
    kind: EventKind | str
    epoch: int
    rank: int | None = None
    cause: str = ""
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    message: str = ""
    severity: Severity | str = Severity.NEUTRAL


def severity_of(kind: str) -> Severity:
    """The severity of a kind, neutral for one that only a newer server knows."""
    return next((known.severity for known in EventKind if known == kind), Severity.NEUTRAL)


class EventLog:
    """The most recent events, and those to come for watchers. Used from one event loop. The first event has the
    sequence after `sequence`."""

    def __init__(self, sequence: int = 0) -> None:
        self._events: collections.deque[Event] = collections.deque(maxlen=RETAINED_EVENTS)
        self._more = asyncio.Event()
        self._sequence = sequence

    def emit(
        self,
        kind: EventKind,
        epoch: int,
        *,
        rank: int | None = None,
        cause: str = "",
        phases: Mapping[str, float] | None = None,
        message: str = "",
    ) -> Event:
        """Append an event that happens now. Raises ValueError when `kind` is no EventKind."""
        self._sequence += 1
        event = Event(
            sequence=self._sequence,
            time=wall(),
            kind=EventKind(kind),
            epoch=max(epoch, 0),
            rank=rank,
            cause=cause,
            phases=dict(phases or {}),
            message=message,
            severity=EventKind(kind).severity,
        )
        self._events.append(event)
        self._more.set()
        self._more = asyncio.Event()
        return event

    def retained(self) -> tuple[Event, ...]:
        """The most recent events, oldest first."""
        return tuple(self._events)

    async def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """Events with a sequence above `after`: first those retained, then each as it is emitted."""
        while True:
            more = self._more
            for event in [e for e in self._events if e.sequence > after]:
                after = event.sequence
                yield event
            if self._sequence <= after:
                await more.wait()
