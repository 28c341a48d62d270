"""The endpoint at which the client of a broken stream goes on, whichever API the call came by."""

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response

from serving.api.http.sse import StreamCursor
from serving.core.request_processor import RequestProcessor
from serving.errors import InvalidRequest
from serving.protocol.request import Call

Resume = Callable[[Request, Call, tuple[int, ...]], Awaitable[Response]]
"""The rest of a call's stream, given the positions that its client has received."""


class ResumeEndpoint:
    """The endpoint over a `RequestProcessor`. `apis` has one function for each `api` in the form of a recorded call;
    calls without one are OpenAI's completions."""

    def __init__(self, processor: RequestProcessor, apis: Mapping[str, Resume]) -> None:
        self._processor = processor
        self._apis = apis

    async def resume(self, request: Request) -> Response:
        """The events of a broken stream that follow the event named by the header Last-Event-ID, with their ids."""
        call_id, received = StreamCursor.parse(request.headers.get("last-event-id", ""))
        call = await self._processor.find_call(call_id)
        if call.form is None or "body" not in call.form:
            raise InvalidRequest("the request came over gRPC; resume it there.", param="last-event-id")
        request.state.request_id = call_id
        return await self._apis[call.form.get("api", "")](request, call, received)
