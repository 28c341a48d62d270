"""Server-sent events: the frames, the response that sends them, and one answer as a stream of them."""

import contextlib
import json
import logging
import re
from collections.abc import AsyncGenerator, Sequence
from itertools import zip_longest
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

from serving.answers import Answer
from serving.errors import Internal, InvalidRequest, MoejaxError
from serving.generation import Item
from serving.http_errors import error_body

log = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """Server-sent events. `sources` are closed in order when the client goes away: its request ends."""

    def __init__(self, *sources: AsyncGenerator[Any, None], headers: dict[str, str] | None = None) -> None:
        quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(sources[0], headers=quiet | (headers or {}), media_type="text/event-stream")
        self._sources = sources

    async def stream_response(self, send: Send) -> None:
        """Send the first source."""
        async with contextlib.AsyncExitStack() as stack:
            for source in reversed(self._sources):
                await stack.enter_async_context(contextlib.aclosing(source))
            await super().stream_response(send)


class Places:
    """How far a client is in the answers of a call, as the ids of its events: the call's, then the events so far of
    each answer, and of what follows the last. `had` is how far it was: it gets none of these again."""

    def __init__(self, call_id: str, answers: int, had: Sequence[int] = ()) -> None:
        self._call_id = call_id
        self._at = [0] * (answers + 1)
        self._had = had

    @staticmethod
    def read(text: str) -> tuple[str, tuple[int, ...]]:
        """The call and the places of an id; a call's id alone is its beginning. Raises InvalidRequest."""
        call_id, _, places = text.partition("/")
        if not call_id or not re.fullmatch(r"(\d{1,9}(\.\d{1,9}){0,10000})?", places, re.ASCII):
            raise InvalidRequest(
                f"Last-Event-ID is {text[:80]!r}; send the id of the last event that came.", param="last-event-id"
            )
        return call_id, tuple(map(int, places.split("."))) if places else ()

    def frame(self, part: Any, answer: int) -> str:
        """The next event of an answer, empty when the client has it."""
        answer %= len(self._at)
        self._at[answer] += 1
        place = self._had[answer] if answer < len(self._had) else 0
        if self._at[answer] <= place:
            return ""
        shown = (max(at, had) for at, had in zip_longest(self._at, self._had[: len(self._at)], fillvalue=0))
        return frame(part, f"{self._call_id}/{'.'.join(map(str, shown))}")


async def answer_events(
    answer: Answer, first: Item, items: AsyncGenerator[Item, None], places: Places | None
) -> AsyncGenerator[str, None]:
    """The answers of a call as OpenAI streams them; an error on the way is an event too. Events have ids when there are
    `places`, and those that the client has are left out."""

    def told(part: Any, answer: int) -> str:
        return frame(part) if places is None else places.frame(part, answer)

    try:
        for part in answer.parts(first):
            yield told(part, first.choice)
        async for item in items:
            for part in answer.parts(item):
                yield told(part, item.choice)
        for part in answer.last():
            yield told(part, -1)
    except MoejaxError as error:
        yield frame(error_body(error))
    except Exception:
        log.exception("a stream failed")
        yield frame(error_body(Internal("internal error; the server's log has the details.")))
    yield "data: [DONE]\n\n"


def frame(value: Any, sequence: int | str | None = None) -> str:
    """One event with JSON data, and an id to go on after."""
    head = "" if sequence is None else f"id: {sequence}\n"
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
