"""OpenAI's endpoints: completions and chat completions; beside them tokenize and detokenize."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from serving.api.http import openai_requests
from serving.api.http.body import cancel_on_disconnect, read_json
from serving.api.http.json_response import ignored_fields_header, json_response
from serving.api.http.models import model_names
from serving.api.http.openai_objects import Tokens, TokenText
from serving.api.http.openai_responses import CompletionResponse
from serving.api.http.sse import EventStream, StreamCursor, response_events, wants_event_ids
from serving.config import HttpSettings
from serving.core.answers import AnswerItem
from serving.core.request_processor import RequestProcessor
from serving.protocol.request import Call
from serving.text.validation import check_tokens


class CompletionEndpoints:
    """The endpoints over a `RequestProcessor`."""

    def __init__(self, processor: RequestProcessor, settings: HttpSettings) -> None:
        self._processor = processor
        self._backend = processor.backend
        self._models = model_names(processor.backend, settings)
        self._strict = settings.strict_fields

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._complete(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._complete(request, chat=True)

    async def _complete(self, request: Request, *, chat: bool) -> Response:
        body = await read_json(request)
        completion = openai_requests.parse_completion(body, chat=chat, models=self._models, strict=self._strict)
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        request.state.request_id = request_id
        accepted = await self._processor.accept_all(
            completion.prompts, completion.params, request_id=request_id, names=completion.names
        )
        created = int(time.time())
        model, tokenizer = self._backend.model.name, self._processor.tokenizer
        response = CompletionResponse(completion, accepted, request_id, model, tokenizer, created)
        form = {"chat": chat, "body": body}
        items = self._processor.stream_call(accepted, completion.params.stop, form=form, created=created)
        headers = ignored_fields_header(request, completion.ignored)
        if not completion.stream:
            return json_response(response.whole(await cancel_on_disconnect(request, _collect(items))), headers)
        wants_ids = completion.event_ids or wants_event_ids(request)
        cursor = StreamCursor(request_id, len(accepted)) if wants_ids and self._backend.resumable else None
        return await self._event_stream(request, response, items, cursor, headers)

    async def resume(self, request: Request, call: Call, received: tuple[int, ...]) -> Response:
        """The events of a recorded call that follow the received ones, with their ids."""
        assert call.form is not None
        body = {**call.form["body"], "model": None}  # the server that took the call may have had another name for it
        completion = openai_requests.parse_completion(body, chat=call.form["chat"], models=self._models)
        model, tokenizer = self._backend.model.name, self._processor.tokenizer
        response = CompletionResponse(completion, call.requests, call.id, model, tokenizer, call.created)
        cursor = StreamCursor(call.id, len(call.requests), received)
        return await self._event_stream(request, response, self._processor.replay(call), cursor, {})

    async def _event_stream(
        self,
        request: Request,
        response: CompletionResponse,
        items: AsyncGenerator[AnswerItem, None],
        cursor: StreamCursor | None,
        headers: dict[str, str],
    ) -> Response:
        first = await cancel_on_disconnect(request, anext(items))  # an error before it still has its own HTTP status
        return EventStream(response_events(response, first, items, cursor), items, headers=headers)

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a prompt or a conversation, the same as in a completion."""
        prompt, body, ignored = openai_requests.parse_tokenize(
            await read_json(request), models=self._models, strict=self._strict
        )
        tokens = await self._processor.tokenize(prompt)
        names = self._processor.tokenizer.format.token
        found = Tokens(
            tokens=list(tokens),
            count=len(tokens),
            max_model_len=self._backend.model.max_context,
            token_strs=[names(each) or "" for each in tokens] if body.return_token_strs else UNSET,
        )
        return json_response(found, ignored_fields_header(request, ignored))

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        tokens, ignored = openai_requests.parse_detokenize(
            await read_json(request), models=self._models, strict=self._strict
        )
        check_tokens(tokens, self._backend.model.vocab_size, "tokens")
        text = TokenText(prompt=self._processor.tokenizer.decode(tokens))
        return json_response(text, ignored_fields_header(request, ignored))


async def _collect(items: AsyncGenerator[AnswerItem, None]) -> list[AnswerItem]:
    async with contextlib.aclosing(items):
        return [item async for item in items]
