"""The log of calls and of what their clients received: of running calls, and of ended ones for a while.

An answer can be replayed from it from any place: by this front or, through the journal, by the front after it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

from serving.core.call_history import CallHistory, JournalFollower, has_ended
from serving.core.call_records import (
    StreamItem,
    encode_call,
    encode_compacted,
    encode_forgotten,
    encode_incidents,
    encode_items,
)
from serving.core.journal import Journal, JournalReplacement
from serving.engine.poison import Incident
from serving.engine.state import Output
from serving.errors import MoejaxError, UnknownRequest
from serving.protocol import clock
from serving.protocol.request import Call, Finished, Token

MIN_COMPACTION_BYTES = 1 << 20
"""Bytes below which a journal is not compacted."""
RETRY_S = 2.0
"""Seconds until a journal that could not be written is tried again."""


class RequestLog:
    """The calls of one server; with `journal` None nothing is kept. Ended calls can be replayed for `retention_s`
    seconds. `records` are those of the journal that `history` does not have yet."""

    def __init__(
        self,
        journal: Journal | None,
        records: Iterable[bytes] = (),
        *,
        history: CallHistory | None = None,
        retention_s: float = 60.0,
        clock: Callable[[], float] = clock.now,
        wall: Callable[[], float] = clock.wall,
    ) -> None:
        self._journal = journal
        self._retention_s = retention_s
        self._history = history or CallHistory(clock=clock, wall=wall)
        self._history.replay(records)
        self._history.go_on()
        self._compaction: Compaction | None = None
        self._retry_at = 0.0
        self.write_error: str | None = None
        """Why the journal cannot be written; None while it can."""

    @classmethod
    def open(cls, folder: Path, *, retention_s: float, follower: JournalFollower | None = None) -> Self:
        """The log in a folder's journal, without reading once more what a follower of it has read. Raises
        StartError."""
        follower = follower or JournalFollower(folder, retention_s)
        journal, records = Journal.open(folder, follower.reader)
        history = follower.extended(records)
        follower.reader.close()
        return cls(journal, history=history, retention_s=retention_s)

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """Failures of ranks that open requests may have caused (`serving.engine.poison`)."""
        return self._history.incidents

    @property
    def enabled(self) -> bool:
        """True when calls can be replayed."""
        return self._journal is not None

    @property
    def epoch(self) -> int:
        """The highest epoch of any token in the log, -1 without tokens."""
        return max(
            (i.epoch for items in self._history.items.values() for i in items if isinstance(i, Token)), default=-1
        )

    def running(self) -> list[Call]:
        """Calls with answers that have not ended, in the order of their arrival."""
        return [call for call in self._history.calls.values() if not self._history.is_complete(call.id)]

    def find_call(self, call_id: str, owner: str) -> Call:
        """A call that its owner can have replayed. Raises UnknownRequest."""
        call = self._history.calls.get(call_id)
        if call is None or call.owner != owner or call_id not in self._history.recorded:
            raise UnknownRequest(
                f"there is no request {call_id!r} to resume. It ended more than {self._retention_s:g} s ago, or "
                "the server keeps no journal (--journal).",
                param="request_id",
            )
        return call

    def items(self, request_id: str) -> tuple[StreamItem, ...]:
        """The items of a request so far."""
        return tuple(self._history.items.get(request_id, ()))

    def register_call(self, call: Call) -> None:
        """Add a call that is about to be submitted."""
        if self.enabled and not any(request.id in self._history.items for request in call.requests):
            self._history.add_call(call)

    def record_accepted(self, request_id: str) -> None:
        """Write the record of a registered call, of which this request was accepted."""
        call = self._history.call_of_request.get(request_id)
        if call is not None and call not in self._history.recorded:
            self._history.recorded.add(call)
            self._append_records([encode_call(self._history.calls[call], self._history.clock_offset_s)])

    def record(self, outputs: Iterable[Output]) -> None:
        """Add the items of a step, and write them, before clients receive them."""
        known = [(request_id, item) for request_id, item in outputs if self._history.add_item(request_id, item)]
        if known:
            ends = any(isinstance(item, (Finished, MoejaxError)) for _, item in known)
            self._append_records([encode_items(known, self._history.wall() if ends else None)])

    def record_incidents(self, incidents: tuple[Incident, ...]) -> None:
        """Write the failures of ranks that open requests may have caused, for the next front."""
        self._history.incidents = incidents
        self._append_records([encode_incidents(incidents)])

    def close_call(self, call_id: str) -> None:
        """The client disconnected, or the call is complete: requests that have not ended count as cancelled."""
        call = self._history.calls.get(call_id)
        if call is None:
            return
        if call_id not in self._history.recorded:
            self._history.forget_call(call_id)
            return
        self.record([(r.id, Finished("cancelled")) for r in call.requests if not has_ended(self._history.items[r.id])])

    def forget_call(self, call_id: str) -> None:
        """Forget a call before its time, for good: a journal says so too."""
        if call_id in self._history.calls:
            recorded = call_id in self._history.recorded
            self._history.forget_call(call_id)
            if recorded:
                self._append_records([encode_forgotten(call_id)])

    def forget_expired(self) -> None:
        """Forget calls that ended more than `retention_s` seconds ago."""
        self._history.forget_ended_before(self._history.clock() - self._retention_s)

    @property
    def needs_compaction(self) -> bool:
        """True when most of the journal is stale, or when a write failed and may be tried again."""
        if self._journal is None or self._compaction is not None:
            return False
        if self.write_error is not None:
            return self._history.clock() >= self._retry_at
        return self._journal.size > max(MIN_COMPACTION_BYTES, 4 * self._history.compacted_bytes)

    def begin_compaction(self) -> "Compaction | None":
        """Begin to write a new journal with the known calls alone. The caller runs `Compaction.write` in another
        thread, then passes the compaction to `finish_compaction`, without a call of `sync` in between. None when no
        new file can be created."""
        if self._journal is None:
            return None
        history = self._history
        known = [
            (
                history.calls[call_id],
                [(r.id, history.items[r.id], len(history.items[r.id])) for r in history.calls[call_id].requests],
                history.ended_at.get(call_id),
            )
            for call_id in history.calls
            if call_id in history.recorded
        ]
        try:
            file = self._journal.begin_replacement()
            self._compaction = Compaction(file, known, history.clock_offset_s, history.incidents)
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
            compaction.file.append([encode_compacted(compaction.file.size), *compaction.records_since])
            self._journal.install(compaction.file)
        except OSError as error:
            self._write_failed(error)
            return
        self._history.compacted_bytes, self.write_error = self._journal.size, None

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
        self._retry_at = self._history.clock() + RETRY_S


KnownCall = tuple[Call, list[tuple[str, list[StreamItem], int]], float | None]
"""A call; by request, its items and how many of them to write; when it ended, in seconds of this process's clock."""


class Compaction:
    """A journal that is being written with the `known` calls alone."""

    def __init__(
        self,
        file: JournalReplacement,
        known: Sequence[KnownCall],
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
        for call, requests, ended_at in self._known:
            yield encode_call(call, self._clock_offset_s)
            at = None if ended_at is None else ended_at + self._clock_offset_s
            for request_id, items, count in requests:
                yield encode_items(((request_id, item) for item in items[:count]), at)
                if pause_s:
                    threading.Event().wait(pause_s)


def token_ids(items: Iterable[StreamItem]) -> tuple[int, ...]:
    """The ids of the tokens among items."""
    return tuple(item.id for item in items if isinstance(item, Token))
