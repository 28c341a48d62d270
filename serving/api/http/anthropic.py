"""Anthropic's endpoints: messages, and the number of tokens of a conversation."""

import contextlib
import functools
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serving.api.http import openai_requests
from serving.api.http.anthropic_events import MessageEvents
from serving.api.http.anthropic_objects import AnthropicMessage, TokenCount
from serving.api.http.anthropic_requests import chat_body, field_names
from serving.api.http.bodies.anthropic import CountTokensBody, MessagesBody
from serving.api.http.bodies.decoding import decode_body
from serving.api.http.body import cancel_on_disconnect, read_json
from serving.api.http.chat_turn import ChatTurn
from serving.api.http.json_response import ignored_fields_header, json_response
from serving.api.http.models import model_names
from serving.api.http.openai_requests import CompletionRequest
from serving.api.http.sse import EventStream, StreamCursor, named_events, wants_event_ids
from serving.config import HttpSettings
from serving.core.answers import AnswerItem
from serving.core.request_processor import RequestProcessor
from serving.protocol.request import Call
from serving.protocol.request import Request as Accepted

FORM = "anthropic"
"""The `api` in the form of a recorded call."""


class MessagesEndpoints:
    """The endpoints over a `RequestProcessor`."""

    def __init__(self, processor: RequestProcessor, settings: HttpSettings) -> None:
        self._processor = processor
        self._models = model_names(processor.backend, settings)
        self._strict = settings.strict_fields

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages."""
        raw = await read_json(request)
        body, ignored = decode_body(raw, MessagesBody, strict=self._strict)
        completion = self._completion(chat_body(body))
        message_id = f"msg_{uuid.uuid4().hex}"
        request.state.request_id = message_id
        accepted = await self._processor.accept_all(
            completion.prompts, completion.params, request_id=message_id, names=field_names(body)
        )
        form = {"chat": True, "api": FORM, "body": raw}
        items = self._processor.stream_call(accepted, completion.params.stop, form=form, created=int(time.time()))
        events = self._events(completion, accepted[0])
        headers = ignored_fields_header(request, ignored)
        if not body.stream:
            return json_response(await cancel_on_disconnect(request, _whole(events, items)), headers)
        wants_ids = wants_event_ids(request) and self._processor.backend.resumable
        cursor = StreamCursor(message_id, 1) if wants_ids else None
        return await _stream(request, events, items, cursor, headers)

    async def resume(self, request: Request, call: Call, received: tuple[int, ...]) -> Response:
        """The events of a recorded call that follow the received ones."""
        assert call.form is not None
        body, _ = decode_body(call.form["body"], MessagesBody)
        events = self._events(self._completion(chat_body(body) | {"model": None}), call.requests[0])
        return await _stream(request, events, self._processor.replay(call), StreamCursor(call.id, 1, received), {})

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens: the tokens of the prompt, the same as in a message."""
        body, ignored = decode_body(await read_json(request), CountTokensBody, strict=self._strict)
        tokens = await self._processor.encode(self._completion(chat_body(body)).prompts[0])
        return json_response(TokenCount(input_tokens=len(tokens)), ignored_fields_header(request, ignored))

    def _completion(self, chat: dict[str, Any]) -> CompletionRequest:
        return openai_requests.parse_completion(chat, chat=True, models=self._models)

    def _events(self, completion: CompletionRequest, accepted: Accepted) -> MessageEvents:
        turn = ChatTurn(completion, accepted, self._processor.tokenizer)
        return MessageEvents(turn, accepted.id, self._models[0], len(accepted.prompt))


async def _whole(events: MessageEvents, items: AsyncGenerator[AnswerItem, None]) -> AnthropicMessage:
    async with contextlib.aclosing(items):
        async for item in items:
            events.push(item)
    return events.message


async def _stream(
    request: Request,
    events: MessageEvents,
    items: AsyncGenerator[AnswerItem, None],
    cursor: StreamCursor | None,
    headers: dict[str, str],
) -> Response:
    encode = None if cursor is None else functools.partial(cursor.frame, choice=0)
    first = await cancel_on_disconnect(request, anext(items))  # an error before it still has its own HTTP status
    return EventStream(named_events(events, first, items, encode), items, headers=headers)
