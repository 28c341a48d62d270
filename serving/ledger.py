"""What was asked and what has been answered: of running calls, and for a while of ended ones. From it an answer is
told again from any place, by this front or, through the journal, by the one after it.

Records are JSON: a call with its requests, then what its clients were told, step after step. What a record says is
true whatever stands between it and its call, and one that says what is known already says nothing.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from serving import errors
from serving.engine import Output
from serving.errors import Internal, MoejaxError, UnknownRequest
from serving.journal import Journal, Rewriting
from serving.request import Finished, Guide, Request, Scored, Token

LEAST_BYTES = 1 << 20
"""A journal below this size is not made smaller."""
RETRY_S = 2.0
"""How soon a journal that could not be written is tried again."""

Item = Scored | Token | Finished | MoejaxError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a client: its requests, and what its answers are told by. `owner` is the API key it came with, `form`
    the JSON that an HTTP answer is made from, `created` in seconds since the epoch."""

    id: str
    requests: tuple[Request, ...]
    stop: tuple[str, ...] = ()
    owner: str = ""
    form: Mapping[str, Any] | None = None
    created: int = 0


class Ledger:
    """The calls of one server; `journal` None keeps nothing. `keep_s`: how long an ended call can be told again."""

    def __init__(
        self,
        journal: Journal | None,
        records: Iterable[bytes] = (),
        *,
        keep_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._keep_s = keep_s
        self._clock = clock
        self._shift = wall() - clock()
        self._calls: dict[str, Call] = {}
        self._written: set[str] = set()
        self._call_of: dict[str, str] = {}
        self._items: dict[str, list[Item]] = {}
        self._ended: dict[str, float] = {}
        self._live = 0
        self._anew: Anew | None = None
        self._retry_at = 0.0
        self.trouble: str | None = None
        """Why the journal cannot be written, while it cannot."""
        for record in records:
            self._read(json.loads(record))
        now = clock()
        self._ended = dict.fromkeys((call for call in self._calls if self._is_over(call)), now)
        if (anew := self.rewrite()) is not None:
            anew.write()
            self.rewritten(anew)

    @property
    def keeps(self) -> bool:
        """Whether calls can be told again."""
        return self._journal is not None

    @property
    def epoch(self) -> int:
        """The last epoch that a token is known of, -1 without any."""
        return max((i.epoch for items in self._items.values() for i in items if isinstance(i, Token)), default=-1)

    def running(self) -> list[Call]:
        """Calls with answers that have not ended, in the order they came."""
        return [call for call in self._calls.values() if not self._is_over(call.id)]

    def is_kept(self, request_id: str) -> bool:
        """Whether a request is of a call that is known."""
        return request_id in self._items

    def recall(self, call_id: str, owner: str) -> Call:
        """A call that can be told again to its owner. Raises UnknownRequest."""
        call = self._calls.get(call_id)
        if call is None or call.owner != owner or call_id not in self._written:
            raise UnknownRequest(
                f"there is no request {call_id!r} to go on with. It ended more than {self._keep_s:g} s ago, or the "
                "server keeps no journal (--journal).",
                param="request_id",
            )
        return call

    def items(self, request_id: str) -> tuple[Item, ...]:
        """What has been told of a request so far."""
        return tuple(self._items.get(request_id, ()))

    def remember(self, call: Call) -> None:
        """A call is about to be accepted."""
        if self.keeps and not any(request.id in self._items for request in call.requests):
            self._take(call)

    def accepted(self, request_id: str) -> None:
        """A request of a call that is remembered runs from now on."""
        call = self._call_of.get(request_id)
        if call is not None and call not in self._written:
            self._written.add(call)
            self._append([_call_record(self._calls[call], self._shift)])

    def note(self, outputs: Iterable[Output]) -> None:
        """What clients are about to be told, of one step."""
        known = [(request_id, item) for request_id, item in outputs if self._add(request_id, item)]
        if known:
            self._append([_record({"told": [[request_id, *_item_json(item)] for request_id, item in known]})])

    def left(self, call_id: str) -> None:
        """The caller has gone, or has all of it: what has not ended has been cancelled."""
        call = self._calls.get(call_id)
        if call is None:
            return
        if call_id not in self._written:
            self._drop(call_id)
            return
        self.note([(r.id, Finished("cancelled")) for r in call.requests if not _is_end(self._items[r.id])])

    def tend(self) -> None:
        """Forget what ended long ago."""
        now = self._clock()
        for call_id in [call for call, at in self._ended.items() if at + self._keep_s <= now]:
            self._drop(call_id)

    @property
    def overgrown(self) -> bool:
        """The journal should be written anew: most of it is over, or it lacks something and may be tried again."""
        if self._journal is None or self._anew is not None:
            return False
        if self.trouble is not None:
            return self._clock() >= self._retry_at
        return self._journal.size > max(LEAST_BYTES, 4 * self._live)

    def rewrite(self) -> "Anew | None":
        """Begin to write the journal anew with what is known and nothing else. The caller lets `Anew.write` run in
        another thread, and gives it back to `rewritten`; `sync` is not called meanwhile. None when it cannot begin."""
        if self._journal is None:
            return None
        known = [
            (
                self._calls[call_id],
                [(r.id, self._items[r.id], len(self._items[r.id])) for r in self._calls[call_id].requests],
            )
            for call_id in self._calls
            if call_id in self._written
        ]
        try:
            self._anew = Anew(self._journal.rewrite(), known, self._shift)
        except OSError as error:
            self._failed(error)
        return self._anew

    def rewritten(self, anew: "Anew") -> None:
        """What was written anew takes the journal's place, with what was noted meanwhile."""
        self._anew = None
        if self._journal is None:
            return
        try:
            if anew.error is not None:
                raise anew.error
            anew.file.add(anew.meanwhile)
            self._journal.take(anew.file)
        except OSError as error:
            self._failed(error)
            return
        self._live, self.trouble = self._journal.size, None

    @property
    def dirty(self) -> bool:
        """The disk may lack something."""
        return self._journal is not None and self._journal.dirty

    def sync(self) -> None:
        """Let the disk have everything. Safe from another thread; what goes wrong shows at the next record."""
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.sync()

    def close(self) -> None:
        """Write nothing more."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _take(self, call: Call) -> None:
        self._calls[call.id] = call
        for request in call.requests:
            self._call_of[request.id] = call.id
            self._items[request.id] = []

    def _drop(self, call_id: str) -> None:
        call = self._calls.pop(call_id)
        self._ended.pop(call_id, None)
        self._written.discard(call_id)
        for request in call.requests:
            del self._call_of[request.id], self._items[request.id]

    def _add(self, request_id: str, item: Item) -> bool:
        """Take an item in, unless it is known or its request is not."""
        items = self._items.get(request_id)
        if items is None or _is_end(items):
            return False
        if isinstance(item, Token) and item.index != _next_index(items):
            return False
        if isinstance(item, Scored) and item.position != scored(items) + 1:
            return False
        items.append(item)
        call = self._call_of[request_id]
        if _is_end(items) and self._is_over(call):
            self._ended[call] = self._clock()
        return True

    def _is_over(self, call_id: str) -> bool:
        return all(_is_end(self._items[request.id]) for request in self._calls[call_id].requests)

    def _append(self, records: list[bytes]) -> None:
        if self._anew is not None:
            self._anew.meanwhile += records
        if self._journal is None or self.trouble is not None:
            return
        try:
            self._journal.append(records)
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.trouble = f"the journal cannot be written: {error.strerror or error}"
        self._retry_at = self._clock() + RETRY_S

    def _read(self, value: Mapping[str, Any]) -> None:
        if "call" in value:
            fields: dict[str, Any] = dict(value["call"])
            fields["requests"] = tuple(_request_value(r, self._shift) for r in fields["requests"])
            fields["stop"] = tuple(fields["stop"])
            call = Call(**fields)
            if call.id not in self._calls:
                self._take(call)
                self._written.add(call.id)
        for request_id, kind, parts in value.get("told", ()):
            self._add(request_id, _item_value(kind, parts))


class Anew:
    """The journal as it is being written anew: `known` calls with their requests' items, so many of each."""

    def __init__(
        self, file: Rewriting, known: list[tuple[Call, list[tuple[str, list[Item], int]]]], shift: float
    ) -> None:
        self.file = file
        self.meanwhile: list[bytes] = []
        """Records of what was noted since."""
        self.error: OSError | None = None
        """Why it could not be written."""
        self._known = known
        self._shift = shift

    def write(self, pause_s: float = 0.0) -> None:
        """Write what is known, from any thread, and let others run for so long after each record."""
        try:
            self.file.write(self._records(pause_s))
        except OSError as error:
            self.error = error

    def _records(self, pause_s: float) -> Iterator[bytes]:
        for call, requests in self._known:
            yield _call_record(call, self._shift)
            for request_id, items, count in requests:
                yield _record({"told": [[request_id, *_item_json(item)] for item in items[:count]]})
                if pause_s:
                    time.sleep(pause_s)


def tokens(items: Iterable[Item]) -> tuple[int, ...]:
    """Ids of the tokens among items."""
    return tuple(item.id for item in items if isinstance(item, Token))


def scored(items: Iterable[Item]) -> int:
    """Prompt tokens whose log-probabilities are among items."""
    return sum(len(item.logprobs) for item in items if isinstance(item, Scored))


def _next_index(items: list[Item]) -> int:
    last = items[-1] if items else None
    return last.index + 1 if isinstance(last, Token) else 0


def _is_end(items: list[Item]) -> bool:
    return bool(items) and isinstance(items[-1], (Finished, MoejaxError))


def _record(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _call_record(call: Call, shift: float) -> bytes:
    return _record({"call": dataclasses.asdict(call) | {"requests": [_request_json(r, shift) for r in call.requests]}})


def _request_json(request: Request, shift: float) -> dict[str, Any]:
    deadline = None if request.deadline is None else request.deadline + shift
    return dataclasses.asdict(request) | {"stop_tokens": sorted(request.stop_tokens), "deadline": deadline}


def _request_value(value: Mapping[str, Any], shift: float) -> Request:
    fields = dict(value)
    fields["prompt"] = tuple(fields["prompt"])
    fields["stop_tokens"] = frozenset(fields["stop_tokens"])
    fields["logit_bias"] = tuple((int(token), bias) for token, bias in fields["logit_bias"])
    fields["guide"] = None if fields["guide"] is None else Guide(**fields["guide"])
    fields["deadline"] = None if fields["deadline"] is None else fields["deadline"] - shift
    return Request(**fields)


def _item_json(item: Item) -> tuple[str, list[Any]]:
    if isinstance(item, Token):
        return "token", [item.index, item.id, item.logprob, item.epoch, item.degraded, item.top, item.reused]
    if isinstance(item, Scored):
        return "scored", [item.position, item.logprobs, item.top]
    if isinstance(item, Finished):
        return "finished", [item.reason, item.reused]
    return "error", [type(item).__name__, str(item), item.param, item.retry_after_s]


def _item_value(kind: str, fields: list[Any]) -> Item:
    if kind == "token":
        index, token, logprob, epoch, degraded, top, reused = fields
        return Token(index, token, logprob, epoch, degraded, _top(top), reused)
    if kind == "scored":
        return Scored(fields[0], tuple(fields[1]), tuple(map(_top, fields[2])))
    if kind == "finished":
        return Finished(*fields)
    name, text, param, retry_after_s = fields
    found = getattr(errors, name, Internal)
    return found(text, param=param, retry_after_s=retry_after_s)


def _top(value: Iterable[Any]) -> tuple[tuple[int, float], ...]:
    return tuple((token, logprob) for token, logprob in value)
