"""Server-sent events: the frames, the response that sends them, and one answer as a stream of them."""

import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

from serving.answers import Answer
from serving.errors import Internal, MoejaxError
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


async def answer_events(answer: Answer, first: Item, items: AsyncGenerator[Item, None]) -> AsyncGenerator[str, None]:
    """The answers of a call as OpenAI streams them; an error on the way is an event too."""
    try:
        for part in answer.parts(first):
            yield frame(part)
        async for item in items:
            for part in answer.parts(item):
                yield frame(part)
        for part in answer.last():
            yield frame(part)
    except MoejaxError as error:
        yield frame(error_body(error))
    except Exception:
        log.exception("a stream failed")
        yield frame(error_body(Internal("internal error; the server's log has the details.")))
    yield "data: [DONE]\n\n"


def frame(value: Any, sequence: int | None = None) -> str:
    """One event with JSON data, and an id to go on after."""
    head = "" if sequence is None else f"id: {sequence}\n"
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
