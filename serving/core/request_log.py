"""The log of calls and of what their clients received: of running calls, and of ended ones for a while.

An answer can be replayed from it from any place: by this front or, through the journal, by the front after it. Records
may stand in any order and more than once: a record that says what is known already changes nothing.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from serving.core.call_records import (
    StreamItem,
    UnreadableCall,
    decode,
    decode_incidents,
    encode_call,
    encode_forgotten,
    encode_incidents,
    encode_items,
    forgotten_call,
)
from serving.core.journal import Journal, JournalReplacement
from serving.engine.poison import Incident
from serving.engine.state import Output
from serving.errors import MoejaxError, UnknownRequest
from serving.observability.logs import SERVER
from serving.protocol import clock
from serving.protocol.request import Call, Finished, Scored, Token

MIN_COMPACTION_BYTES = 1 << 20
"""Bytes below which a journal is not compacted."""
RETRY_S = 2.0
"""Seconds until a journal that could not be written is tried again."""


class RequestLog:
    """The calls of one server; with `journal` None nothing is kept. Ended calls can be replayed for `retention_s`
    seconds."""

    def __init__(
        self,
        journal: Journal | None,
        records: Iterable[bytes] = (),
        *,
        retention_s: float = 60.0,
        clock: Callable[[], float] = clock.now,
        wall: Callable[[], float] = clock.wall,
    ) -> None:
        self._journal = journal
        self._retention_s = retention_s
        self._clock = clock
        self._clock_offset_s = wall() - clock()
        self._calls: dict[str, Call] = {}
        self._recorded: set[str] = set()
        self._call_of_request: dict[str, str] = {}
        self._items: dict[str, list[StreamItem]] = {}
        self._ended_at: dict[str, float] = {}
        self._compacted_bytes = 0
        self._compaction: Compaction | None = None
        self._retry_at = 0.0
        self.incidents: tuple[Incident, ...] = ()
        """Failures of ranks that open requests may have caused (`serving.engine.poison`)."""
        self.write_error: str | None = None
        """Why the journal cannot be written; None while it can."""
        for record in records:
            self._replay_record(record)
        now = clock()
        self._ended_at = dict.fromkeys((call for call in self._calls if self._is_complete(call)), now)
        if (compaction := self.begin_compaction()) is not None:
            compaction.write()
            self.finish_compaction(compaction)

    @property
    def enabled(self) -> bool:
        """True when calls can be replayed."""
        return self._journal is not None

    @property
    def epoch(self) -> int:
        """The highest epoch of any token in the log, -1 without tokens."""
        return max((i.epoch for items in self._items.values() for i in items if isinstance(i, Token)), default=-1)

    def running(self) -> list[Call]:
        """Calls with answers that have not ended, in the order of their arrival."""
        return [call for call in self._calls.values() if not self._is_complete(call.id)]

    def find_call(self, call_id: str, owner: str) -> Call:
        """A call that its owner can have replayed. Raises UnknownRequest."""
        call = self._calls.get(call_id)
        if call is None or call.owner != owner or call_id not in self._recorded:
            raise UnknownRequest(
                f"there is no request {call_id!r} to resume. It ended more than {self._retention_s:g} s ago, or "
                "the server keeps no journal (--journal).",
                param="request_id",
            )
        return call

    def items(self, request_id: str) -> tuple[StreamItem, ...]:
        """The items of a request so far."""
        return tuple(self._items.get(request_id, ()))

    def register_call(self, call: Call) -> None:
        """Add a call that is about to be submitted."""
        if self.enabled and not any(request.id in self._items for request in call.requests):
            self._add_call(call)

    def record_accepted(self, request_id: str) -> None:
        """Write the record of a registered call, of which this request was accepted."""
        call = self._call_of_request.get(request_id)
        if call is not None and call not in self._recorded:
            self._recorded.add(call)
            self._append_records([encode_call(self._calls[call], self._clock_offset_s)])

    def record(self, outputs: Iterable[Output]) -> None:
        """Add the items of a step, and write them, before clients receive them."""
        known = [(request_id, item) for request_id, item in outputs if self._add_item(request_id, item)]
        if known:
            self._append_records([encode_items(known)])

    def record_incidents(self, incidents: tuple[Incident, ...]) -> None:
        """Write the failures of ranks that open requests may have caused, for the next front."""
        self.incidents = incidents
        self._append_records([encode_incidents(incidents)])

    def close_call(self, call_id: str) -> None:
        """The client disconnected, or the call is complete: requests that have not ended count as cancelled."""
        call = self._calls.get(call_id)
        if call is None:
            return
        if call_id not in self._recorded:
            self._forget_call(call_id)
            return
        self.record([(r.id, Finished("cancelled")) for r in call.requests if not _has_ended(self._items[r.id])])

    def forget_call(self, call_id: str) -> None:
        """Forget a call before its time, for good: a journal says so too."""
        if call_id in self._calls:
            recorded = call_id in self._recorded
            self._forget_call(call_id)
            if recorded:
                self._append_records([encode_forgotten(call_id)])

    def forget_expired(self) -> None:
        """Forget calls that ended more than `retention_s` seconds ago."""
        now = self._clock()
        for call_id in [call for call, at in self._ended_at.items() if at + self._retention_s <= now]:
            self._forget_call(call_id)

    @property
    def needs_compaction(self) -> bool:
        """True when most of the journal is stale, or when a write failed and may be tried again."""
        if self._journal is None or self._compaction is not None:
            return False
        if self.write_error is not None:
            return self._clock() >= self._retry_at
        return self._journal.size > max(MIN_COMPACTION_BYTES, 4 * self._compacted_bytes)

    def begin_compaction(self) -> "Compaction | None":
        """Begin to write a new journal with the known calls alone. The caller runs `Compaction.write` in another
        thread, then passes the compaction to `finish_compaction`, without a call of `sync` in between. None when no
        new file can be created."""
        if self._journal is None:
            return None
        known = [
            (
                self._calls[call_id],
                [(r.id, self._items[r.id], len(self._items[r.id])) for r in self._calls[call_id].requests],
            )
            for call_id in self._calls
            if call_id in self._recorded
        ]
        try:
            file = self._journal.begin_replacement()
            self._compaction = Compaction(file, known, self._clock_offset_s, self.incidents)
        except OSError as error:
            self._write_failed(error)
        return self._compaction

    def finish_compaction(self, compaction: "Compaction") -> None:
        """Put the compacted file in the journal's place, with the records since its beginning at its end."""
        self._compaction = None
        if self._journal is None:
            return
        try:
            if compaction.error is not None:
                raise compaction.error
            compaction.file.append(compaction.records_since)
            self._journal.install(compaction.file)
        except OSError as error:
            self._write_failed(error)
            return
        self._compacted_bytes, self.write_error = self._journal.size, None

    @property
    def dirty(self) -> bool:
        """True when something was written since the last `sync`."""
        return self._journal is not None and self._journal.dirty

    def sync(self) -> None:
        """Wait until the disk has everything. Safe from another thread; an error shows at the next record."""
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.sync()

    def close(self) -> None:
        """Close the journal; later records are not written."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _add_call(self, call: Call) -> None:
        self._calls[call.id] = call
        for request in call.requests:
            self._call_of_request[request.id] = call.id
            self._items[request.id] = []

    def _forget_call(self, call_id: str) -> None:
        call = self._calls.pop(call_id)
        self._ended_at.pop(call_id, None)
        self._recorded.discard(call_id)
        for request in call.requests:
            del self._call_of_request[request.id], self._items[request.id]

    def _add_item(self, request_id: str, item: StreamItem) -> bool:
        """Add an item. False when the log has it already, or does not have its request."""
        items = self._items.get(request_id)
        if items is None or _has_ended(items):
            return False
        if isinstance(item, Token) and item.index != _next_token_index(items):
            return False
        if isinstance(item, Scored) and item.position != scored_count(items) + 1:
            return False
        items.append(item)
        call = self._call_of_request[request_id]
        if _has_ended(items) and self._is_complete(call):
            self._ended_at[call] = self._clock()
        return True

    def _is_complete(self, call_id: str) -> bool:
        return all(_has_ended(self._items[request.id]) for request in self._calls[call_id].requests)

    def _append_records(self, records: list[bytes]) -> None:
        if self._compaction is not None:
            self._compaction.records_since += records
        if self._journal is None or self.write_error is not None:
            return
        try:
            self._journal.append(records)
        except OSError as error:
            self._write_failed(error)

    def _write_failed(self, error: OSError) -> None:
        self.write_error = f"the journal cannot be written: {error.strerror or error}"
        self._retry_at = self._clock() + RETRY_S

    def _replay_record(self, record: bytes) -> None:
        if (incidents := decode_incidents(record)) is not None:
            self.incidents = incidents
            return
        forgotten = forgotten_call(record)
        if forgotten is not None:
            if forgotten in self._calls:
                self._forget_call(forgotten)
            return
        try:
            call, items = decode(record, self._clock_offset_s)
        except UnreadableCall as error:
            SERVER.warning("the journal has a call that this code cannot read: %s", error)
            return
        if call is not None and call.id not in self._calls:
            self._add_call(call)
            self._recorded.add(call.id)
        for request_id, item in items:
            self._add_item(request_id, item)


class Compaction:
    """A journal that is being written with the `known` calls alone: each with, by request, the list of its items and
    how many of them to write."""

    def __init__(
        self,
        file: JournalReplacement,
        known: list[tuple[Call, list[tuple[str, list[StreamItem], int]]]],
        clock_offset_s: float,
        incidents: tuple[Incident, ...] = (),
    ) -> None:
        self.file = file
        self.records_since: list[bytes] = []
        """Records since the beginning of the compaction."""
        self.error: OSError | None = None
        """Why the file could not be written, if so."""
        self._known = known
        self._clock_offset_s = clock_offset_s
        self._incidents = incidents

    def write(self, pause_s: float = 0.0) -> None:
        """Write the known calls, from any thread, with a pause of `pause_s` seconds after each record for other
        threads."""
        try:
            self.file.write(self._records(pause_s))
        except OSError as error:
            self.error = error

    def _records(self, pause_s: float) -> Iterator[bytes]:
        if self._incidents:
            yield encode_incidents(self._incidents)
        for call, requests in self._known:
            yield encode_call(call, self._clock_offset_s)
            for request_id, items, count in requests:
                yield encode_items((request_id, item) for item in items[:count])
                if pause_s:
                    threading.Event().wait(pause_s)


def token_ids(items: Iterable[StreamItem]) -> tuple[int, ...]:
    """The ids of the tokens among items."""
    return tuple(item.id for item in items if isinstance(item, Token))


def scored_count(items: Iterable[StreamItem]) -> int:
    """The number of prompt tokens whose log-probabilities are among items."""
    return sum(len(item.logprobs) for item in items if isinstance(item, Scored))


def _next_token_index(items: list[StreamItem]) -> int:
    last = items[-1] if items else None
    return last.index + 1 if isinstance(last, Token) else 0


def _has_ended(items: list[StreamItem]) -> bool:
    return bool(items) and isinstance(items[-1], (Finished, MoejaxError))
