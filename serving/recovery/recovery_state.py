"""Holds the membership of a server. Every change is an event."""

from collections.abc import Callable

from serving.protocol import clock
from serving.recovery.membership import Membership
from serving.recovery.membership_events import Effect, Event
from serving.recovery.transitions import on


class RecoveryState:
    """The membership now. Effects of an event are given to `execute`, with the epoch after it, before `record` returns;
    `wake` makes the engine's loop look again at what is due."""

    def __init__(
        self,
        membership: Membership | None = None,
        execute: Callable[[Effect, int], None] = lambda effect, epoch: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._membership = membership or Membership()
        self._execute = execute
        self._wake = wake

    @property
    def membership(self) -> Membership:
        """The membership after the last event."""
        return self._membership

    def record(self, event: Event) -> None:
        """Take in what has happened."""
        before = self._membership
        self._membership, effects = on(before, event, clock.now())
        for effect in effects:
            self._execute(effect, self._membership.epoch)
        if self._membership is not before:
            self._wake()
