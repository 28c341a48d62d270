"""The history of calls and of their answers, as the records of a journal say it.

Records may stand in any order and more than once: a record that says what is known already changes nothing.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from serving.core.call_records import StreamItem, UnreadableCall, decode
from serving.core.journal import JournalReader
from serving.engine.poison import Incident
from serving.errors import MoejaxError
from serving.observability.logs import SERVER
from serving.protocol import clock
from serving.protocol.request import Call, Finished, Scored, Token

READ_BYTES = 1 << 18
"""Bytes of a journal that a follower reads at once."""


class CallHistory:
    """Calls, the items of their answers so far, and when they ended, in seconds of `clock`."""

    def __init__(self, *, clock: Callable[[], float] = clock.now, wall: Callable[[], float] = clock.wall) -> None:
        self.clock = clock
        self.clock_offset_s = wall() - clock()
        """The wall clock less this process's, in seconds."""
        self.calls: dict[str, Call] = {}
        self.recorded: set[str] = set()
        """Ids of calls of which a record was written: at least one request was accepted."""
        self.call_of_request: dict[str, str] = {}
        self.items: dict[str, list[StreamItem]] = {}
        """The items of each request."""
        self.ended_at: dict[str, float] = {}
        """When each call ended that has."""
        self.incidents: tuple[Incident, ...] = ()
        """Failures of ranks that open requests may have caused (`serving.engine.poison`)."""
        self.compacted_bytes = 0
        """Bytes of the journal when it was compacted last."""

    def wall(self) -> float:
        """The time in seconds of the wall clock."""
        return self.clock() + self.clock_offset_s

    def add_call(self, call: Call) -> None:
        """Add a call without items."""
        self.calls[call.id] = call
        for request in call.requests:
            self.call_of_request[request.id] = call.id
            self.items[request.id] = []

    def forget_call(self, call_id: str) -> None:
        """Drop a call that is there."""
        call = self.calls.pop(call_id)
        self.ended_at.pop(call_id, None)
        self.recorded.discard(call_id)
        for request in call.requests:
            del self.call_of_request[request.id], self.items[request.id]

    def forget_ended_before(self, moment: float) -> None:
        """Drop calls that ended before a time of the clock, or at it."""
        for call_id in [call for call, at in self.ended_at.items() if at <= moment]:
            self.forget_call(call_id)

    def add_item(self, request_id: str, item: StreamItem, at: float | None = None) -> bool:
        """Add an item that was recorded at the time `at` of the clock (default: now). Returns False when the item is
        known already, or its request is not."""
        items = self.items.get(request_id)
        if items is None or has_ended(items):
            return False
        if isinstance(item, Token) and item.index != _next_token_index(items):
            return False
        if isinstance(item, Scored) and item.position != scored_count(items) + 1:
            return False
        items.append(item)
        call = self.call_of_request[request_id]
        if has_ended(items) and self.is_complete(call):
            self.ended_at[call] = self.clock() if at is None else at
        return True

    def is_complete(self, call_id: str) -> bool:
        """Whether all answers of a call have ended."""
        return all(has_ended(self.items[request.id]) for request in self.calls[call_id].requests)

    def replay(self, records: Iterable[bytes]) -> None:
        """Add the calls and items of records. A call that this code cannot read is left out, with a warning in the
        log."""
        for each in records:
            try:
                record = decode(each, self.clock_offset_s)
            except UnreadableCall as error:
                SERVER.warning("the journal has a call that this code cannot read: %s", error)
                continue
            if record.incidents is not None:
                self.incidents = record.incidents
            if record.compacted is not None:
                self.compacted_bytes = record.compacted
            if record.forgotten in self.calls:
                self.forget_call(record.forgotten)
            if record.call is not None and record.call.id not in self.calls:
                self.add_call(record.call)
                self.recorded.add(record.call.id)
            at = None if record.at is None else record.at - self.clock_offset_s
            for request_id, item in record.items:
                self.add_item(request_id, item, at)

    def go_on(self) -> None:
        """Leave out the time in which no front ran: all ends are moved forward until the last of them is now, so that
        clients can resume ended calls for as long as if the front had not died."""
        missed = self.clock() - max(self.ended_at.values(), default=self.clock())
        self.ended_at = {call: at + missed for call, at in self.ended_at.items()}


class JournalFollower:
    """Reads the history in a folder's journal while another process, the front that serves, writes it: the standby
    front then knows it when it takes over. Ended calls are dropped after `retention_s` seconds."""

    def __init__(self, folder: Path, retention_s: float) -> None:
        self.folder = folder
        self.reader = JournalReader(folder)
        self._history = CallHistory()
        self._begins = 0
        self._retention_s = retention_s

    def read(self) -> bool:
        """Read the next READ_BYTES of the journal. Returns whether it may have more. Raises OSError."""
        records = self.reader.read(READ_BYTES)
        history = self.extended(records)
        history.forget_ended_before(history.clock() - self._retention_s)
        return bool(records)

    def extended(self, records: Iterable[bytes]) -> CallHistory:
        """The history after `records`, which `reader` has just read. It begins empty when the reader has started again
        at the beginning of the file."""
        if self.reader.begins != self._begins:
            self._history, self._begins = CallHistory(), self.reader.begins
        self._history.replay(records)
        return self._history


def scored_count(items: Iterable[StreamItem]) -> int:
    """The number of prompt tokens whose log-probabilities are among items."""
    return sum(len(item.logprobs) for item in items if isinstance(item, Scored))


def has_ended(items: list[StreamItem]) -> bool:
    """Whether an answer with these items has ended."""
    return bool(items) and isinstance(items[-1], (Finished, MoejaxError))


def _next_token_index(items: list[StreamItem]) -> int:
    last = items[-1] if items else None
    return last.index + 1 if isinstance(last, Token) else 0
