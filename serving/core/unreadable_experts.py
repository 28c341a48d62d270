"""Experts that the weight store could not give: each is reported once, and read again from time to time."""

from serving.protocol import clock
from serving.protocol.events import EventKind, EventLog
from serving.recovery.failover import Failover

RETRY_S = 5.0
"""Seconds between two attempts to read unreadable experts."""


class UnreadableExperts:
    """Reports and retries the experts in `Adoption.unreadable`."""

    def __init__(self, failover: Failover, events: EventLog) -> None:
        self._failover = failover
        self._events = events
        self._reported: set[tuple[int, int]] = set()
        self._retry_at = 0.0

    def report_and_retry(self) -> None:
        """Report experts that became unreadable; else let the failover try again when that is due."""
        failover, adoption, now = self._failover, self._failover.adoption, clock.now()
        new = adoption.unreadable.keys() - self._reported
        if new:
            self._reported |= new
            why, masked = adoption.unreadable[min(new)], len(failover.plan.masked) if failover.plan else 0
            what = f"{masked} experts masked" if adoption.can_step else f"no step is made without all {masked} of them"
            self._events.emit(EventKind.STORE_UNREADABLE, failover.epoch, cause=why, message=what)
            self._retry_at = now + RETRY_S
        elif adoption.unreadable and now > self._retry_at:
            adoption.retry_unreadable()
            self._retry_at = now + RETRY_S
