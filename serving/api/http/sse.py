"""Server-sent events: the frames, the response that sends them, and a completion as a stream of them."""

import contextlib
import logging
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable

import msgspec
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Send

from serving.api.http.errors import error_body
from serving.api.http.openai_responses import CompletionResponse
from serving.core.answers import AnswerItem
from serving.errors import Internal, InvalidRequest, MoejaxError

log = logging.getLogger(__name__)

EVENT_IDS = "X-Moejax-Event-Ids"
"""A request with this header "true" gets a stream whose events have ids; so does OpenAI's with `event_ids`."""

_LINE_ENDS = tuple((mark.encode(), f"\\u{ord(mark):04x}".encode()) for mark in "\u0085\u2028\u2029")
"""Characters that JSON allows in a text as they are, and at which clients that split lines as Unicode does would cut an
event; and what JSON writes them as."""


class EventStream(StreamingResponse):
    """A response of server-sent events. It sends the first of `sources`, and closes all of them in order when the
    client disconnects, which cancels its request."""

    def __init__(self, *sources: AsyncGenerator[Any, None], headers: dict[str, str] | None = None) -> None:
        quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(sources[0], headers=quiet | (headers or {}), media_type="text/event-stream")
        self._sources = sources

    async def stream_response(self, send: Send) -> None:
        """Send the frames of the first source."""
        async with contextlib.AsyncExitStack() as stack:
            for source in reversed(self._sources):
                await stack.enter_async_context(contextlib.aclosing(source))
            await super().stream_response(send)


class StreamCursor:
    """The position of a client in the streams of a call, written as the id of each event to callers that ask for ids.

    An id is the id of the call, then the number of events so far of each choice and of the part after the last choice.
    `received` is the position of a client that resumes: it gets none of those events again.
    """

    def __init__(self, call_id: str, choices: int, received: Sequence[int] = ()) -> None:
        self._call_id = call_id
        self._sent = [0] * (choices + 1)
        self._received = received

    @staticmethod
    def parse(text: str) -> tuple[str, tuple[int, ...]]:
        """The call and the positions in an event id; the id of a call alone is its beginning. Raises InvalidRequest."""
        call_id, _, positions = text.partition("/")
        if not call_id or not re.fullmatch(r"(\d{1,9}(\.\d{1,9}){0,10000})?", positions, re.ASCII):
            raise InvalidRequest(
                f"Last-Event-ID is {text[:80]!r}; send the id of the last event that you received.",
                param="last-event-id",
            )
        return call_id, tuple(map(int, positions.split("."))) if positions else ()

    def frame(self, part: Any, choice: int) -> bytes:
        """The frame of the next event of a choice; empty when the client has received it."""
        choice %= len(self._sent)
        self._sent[choice] += 1
        if self._sent[choice] <= (self._received[choice] if choice < len(self._received) else 0):
            return b""
        pairs = zip_longest(self._sent, self._received[: len(self._sent)], fillvalue=0)
        return frame(part, f"{self._call_id}/{'.'.join(str(max(pair)) for pair in pairs)}")


async def response_events(
    response: CompletionResponse,
    first: AnswerItem,
    items: AsyncGenerator[AnswerItem, None],
    cursor: StreamCursor | None,
) -> AsyncGenerator[bytes, None]:
    """The frames of a response in OpenAI's stream format. An error on the way is an event too.

    With a `cursor`, events have ids, and events that the client has received are left out.
    """

    def choice_frame(part: Any, choice: int) -> bytes:
        return frame(part) if cursor is None else cursor.frame(part, choice)

    try:
        for part in response.stream_parts(first):
            yield choice_frame(part, first.choice)
        async for item in items:
            for part in response.stream_parts(item):
                yield choice_frame(part, item.choice)
        for part in response.final_parts():
            yield choice_frame(part, -1)
    except MoejaxError as error:
        yield frame(error_body(error))
    except Exception:
        log.exception("a stream failed")
        yield frame(error_body(Internal("internal error; the server's log has the details.")))
    yield b"data: [DONE]\n\n"


@runtime_checkable
class NamedEvents(Protocol):
    """A response as a stream of events, each with a name: the tag of its model."""

    def push(self, item: AnswerItem) -> Sequence[msgspec.Struct]:
        """The events of an item."""
        ...

    def fail(self, error: MoejaxError) -> Sequence[msgspec.Struct]:
        """The last events of a response that fails."""
        ...


async def named_events(
    events: NamedEvents,
    first: AnswerItem | None,
    items: AsyncGenerator[AnswerItem, None],
    encode: "Callable[[Any], bytes] | None" = None,
) -> AsyncGenerator[bytes, None]:
    """The frames of the events of a response: of the `first` item, if it was awaited, and of the others. An error on
    the way is an event too.

    `encode` makes the frame of an event, empty for one that the client has received; without it, all are sent.
    """
    encode = encode or frame
    try:
        if first is not None:
            yield _named(events.push(first), encode)
        async for item in items:
            yield _named(events.push(item), encode)
    except MoejaxError as error:
        yield _named(events.fail(error), frame)
    except Exception:
        log.exception("a stream failed")
        yield _named(events.fail(Internal("internal error; the server's log has the details.")), frame)


def _named(events: Sequence[msgspec.Struct], encode: Callable[[Any], bytes]) -> bytes:
    made = ((each, encode(each)) for each in events)
    return b"".join(f"event: {each.__struct_config__.tag}\n".encode() + data for each, data in made if data)


def wants_event_ids(request: Request) -> bool:
    """Whether the header of a request asks for events with ids."""
    return request.headers.get(EVENT_IDS, "").lower() in ("true", "1")


def frame(value: Any, sequence: int | str | None = None) -> bytes:
    """One event with JSON data and, if `sequence` is given, an id from which a client can resume.

    The data come first: there are clients that take the first line of every event for them.
    """
    data = msgspec.json.encode(value)
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return b"data: " + data + (b"\n\n" if sequence is None else f"\nid: {sequence}\n\n".encode())
