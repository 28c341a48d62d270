"""OpenAI's endpoints of responses: create, get, cancel, delete."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from serving.api.http import openai_requests
from serving.api.http.bodies.decoding import decode_body
from serving.api.http.bodies.responses import InputItem, ResponsesBody
from serving.api.http.body import cancel_on_disconnect, read_json
from serving.api.http.chat_turn import ChatTurn
from serving.api.http.json_response import ignored_fields_header, json_response
from serving.api.http.models import model_names
from serving.api.http.responses_events import ResponseEvents
from serving.api.http.responses_objects import DeletedResponse, ResponseObject
from serving.api.http.responses_requests import NAMES, chat_body, input_messages
from serving.api.http.sse import EventStream, frame, named_events
from serving.config import HttpSettings
from serving.core.answers import AnswerItem
from serving.core.request_processor import RequestProcessor
from serving.errors import InvalidRequest, MoejaxError, UnknownRequest
from serving.protocol.backend import answered
from serving.protocol.request import Call
from serving.protocol.request import Request as Accepted

FORM = "responses"
"""The `api` in the form of a recorded call."""
_RUNNING = ("queued", "in_progress")


class ResponsesEndpoints:
    """The endpoints over a `RequestProcessor`. Responses are kept in the request log, and by the journal."""

    def __init__(self, processor: RequestProcessor, settings: HttpSettings) -> None:
        self._processor = processor
        self._models = model_names(processor.backend, settings)
        self._strict = settings.strict_fields
        self._background: set[asyncio.Task[None]] = set()

    async def create(self, request: Request) -> Response:
        """POST /v1/responses."""
        raw = await read_json(request)
        body, ignored = decode_body(raw, ResponsesBody, strict=self._strict)
        self._check_background(body)
        earlier = [] if body.previous_response_id is None else await self._earlier_messages(body.previous_response_id)
        messages = [*earlier, *input_messages(body.input)]
        completion = openai_requests.parse_completion(chat_body(body, messages), chat=True, models=self._models)
        response_id, created = f"resp_{uuid.uuid4().hex}", int(time.time())
        request.state.request_id = response_id
        accepted = await self._processor.accept_all(
            completion.prompts, completion.params, request_id=response_id, names=NAMES
        )
        form = {"chat": True, "api": FORM, "body": raw, "messages": messages}
        items = self._processor.stream_call(accepted, completion.params.stop, form=form, created=created)
        headers = ignored_fields_header(request, ignored)
        events = self._events(body, messages, accepted[0], created)
        if body.background:
            await self._start(items)
            if not body.stream:
                return json_response(events.response, headers)
            items = self._processor.replay(await self._processor.find_call(response_id))
        if body.stream:
            first = await cancel_on_disconnect(request, anext(items))  # an error before it has its own HTTP status
            return EventStream(named_events(events, first, items), items, headers=headers)
        return json_response(await cancel_on_disconnect(request, _whole(events, items)), headers)

    async def get(self, request: Request) -> Response:
        """GET /v1/responses/ID; with `?stream=true&starting_after=N` the events after number N."""
        call, query = await self._find(request.path_params["id"]), request.query_params
        request.state.request_id = call.id
        if query.get("stream", "false") != "true":
            return json_response(await self._so_far(call))
        after = query.get("starting_after", "-1")
        if not after.removeprefix("-").isdecimal() or len(after) > 9:
            raise InvalidRequest(
                f"starting_after is {after[:20]!r}; it must be the sequence number of an event.", param="starting_after"
            )
        items = self._processor.replay(call)
        return EventStream(named_events(self._recorded(call), None, items, _Unsent(int(after))), items)

    async def resume(self, request: Request, call: Call, received: tuple[int, ...]) -> Response:
        """The events of a recorded call after so many, for those who resume as at the other endpoints."""
        items = self._processor.replay(call)
        unsent = _Unsent(sum(received) - 1)
        return EventStream(named_events(self._recorded(call), None, items, unsent), items)

    async def cancel(self, request: Request) -> Response:
        """POST /v1/responses/ID/cancel: the response, which runs no longer."""
        call = await self._find(request.path_params["id"])
        return json_response(await self._so_far(call, follow=await self._processor.abort(call.id)))

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/responses/ID: it is cancelled, and cannot be asked for again."""
        call = await self._find(request.path_params["id"])
        await self._processor.abort(call.id)
        await answered(self._processor.backend.forget_call(call.id))
        return json_response(DeletedResponse(id=call.id))

    def _check_background(self, body: ResponsesBody) -> None:
        if not body.background:
            return
        if body.store is False:
            raise InvalidRequest("a response in the background is stored. Leave out store.", param="store")
        if not self._processor.backend.resumable:
            raise InvalidRequest(
                "a response in the background needs the journal, which this server does not keep (--journal).",
                param="background",
            )

    async def _start(self, items: AsyncGenerator[AnswerItem, None]) -> None:
        """Run a call in the background. Raises MoejaxError when it is refused at once."""
        accepted = asyncio.Event()

        async def run() -> None:
            async with contextlib.aclosing(items):
                accepted.set()
                async for _ in items:
                    pass

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._ended)
        await accepted.wait()
        if task.done():
            await task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.exception()  # the request log has it

    async def _find(self, response_id: str) -> Call:
        call = await self._processor.find_call(response_id)
        if call.form is None or call.form.get("api") != FORM or call.form["body"].get("store") is False:
            raise UnknownRequest(f"there is no response {response_id!r}.", param="response_id")
        return call

    async def _earlier_messages(self, response_id: str) -> list[dict[str, Any]]:
        """The messages up to the end of an earlier response."""
        call = await self._find(response_id)
        assert call.form is not None
        response = await self._so_far(call)
        if response.status in _RUNNING:
            raise InvalidRequest(
                f"the response {response_id!r} is not complete: its status is {response.status}. Wait for its end.",
                param="previous_response_id",
            )
        output = msgspec.convert(msgspec.to_builtins(response.output), list[InputItem])
        return [*call.form["messages"], *input_messages(output)]

    async def _so_far(self, call: Call, *, follow: bool = False) -> ResponseObject:
        """A recorded response as it is now, with `follow` as it is at its end."""
        events = self._recorded(call)
        async with contextlib.aclosing(self._processor.replay(call, follow=follow)) as items:
            try:
                async for item in items:
                    events.push(item)
            except MoejaxError as error:
                events.fail(error)
        return events.response

    def _recorded(self, call: Call) -> ResponseEvents:
        assert call.form is not None
        body, _ = decode_body(call.form["body"], ResponsesBody)
        return self._events(body, call.form["messages"], call.requests[0], call.created)

    def _events(
        self, body: ResponsesBody, messages: Sequence[Mapping[str, Any]], accepted: Accepted, created: int
    ) -> ResponseEvents:
        chat = chat_body(body, messages) | {"model": None}  # the call may be of a server with another name for it
        completion = openai_requests.parse_completion(chat, chat=True, models=self._models)
        response = _response(body, accepted, created, self._models[0])
        return ResponseEvents(ChatTurn(completion, accepted, self._processor.tokenizer), response)


class _Unsent:
    """Frames of the events after number `after`."""

    def __init__(self, after: int) -> None:
        self._after = after

    def __call__(self, event: Any) -> bytes:
        return frame(event) if event.sequence_number > self._after else b""


async def _whole(events: ResponseEvents, items: AsyncGenerator[AnswerItem, None]) -> ResponseObject:
    async with contextlib.aclosing(items):
        async for item in items:
            events.push(item)
    return events.response


def _response(body: ResponsesBody, accepted: Accepted, created: int, model: str) -> ResponseObject:
    """A response that has not begun."""
    form = None if body.text is None else body.text.format
    reasoning = body.reasoning
    return ResponseObject(
        id=accepted.id,
        created_at=created,
        status="queued",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": None if reasoning is None else reasoning.effort, "summary": None},
        store=body.store is not False,
        temperature=accepted.sampling.temperature,
        text={"format": {"type": "text"} if form is None else msgspec.to_builtins(form)},
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=[msgspec.to_builtins(tool) for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=accepted.sampling.top_p,
    )
