"""The endpoints under /fault_tolerance/: status, history, events, planned changes, reports of device errors, kill."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api.http.body import read_json
from serving.api.http.sse import EventStream, frame
from serving.api.shutdown import Shutdown
from serving.auth.api_keys import CALLER
from serving.core.request_processor import RequestProcessor
from serving.errors import Draining, InvalidRequest
from serving.observability.history import History
from serving.protocol.backend import SIGNALS, SIGNALS_TO_WEIGHTS, answered
from serving.protocol.instructions import DeviceError, Instruction, check_may_operate
from serving.version import version


class FaultToleranceEndpoints:
    """The endpoints over the backend of a `RequestProcessor`."""

    def __init__(self, processor: RequestProcessor, shutdown: Shutdown, history: History) -> None:
        self._processor = processor
        self._backend = processor.backend
        self._shutdown = shutdown
        self._history = history

    async def status(self, _: Request) -> Response:
        """The status, the model, the version and the loss forecasts."""
        model = dataclasses.asdict(self._processor.model)
        forecasts = await answered(self._backend.what_if())
        more = {"model": model, "version": version(), "what_if": list(map(dataclasses.asdict, forecasts))}
        return JSONResponse(dataclasses.asdict(await answered(self._backend.status())) | more)

    async def history(self, request: Request) -> Response:
        """The figures of each second of the last ten minutes, or with `by=minute` of each minute of the last day."""
        by = request.query_params.get("by", "second")
        if by not in ("second", "minute"):
            raise InvalidRequest(f"by is {by[:40]!r}; it must be second or minute.", param="by")
        return JSONResponse(self._history.columns(minutes=by == "minute"))

    async def events(self, request: Request) -> Response:
        """Events as server-sent events, from the sequence that `after` or Last-Event-ID names."""
        text = request.headers.get("last-event-id") or request.query_params.get("after", "0")
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise InvalidRequest(f"after is {text[:40]!r}; it must be the sequence of an event.", param="after")
        return EventStream(self._watch(int(text)))

    async def _watch(self, after: int) -> AsyncGenerator[bytes, None]:
        with contextlib.suppress(Draining):  # the reader reconnects when the server is back
            async with contextlib.aclosing(self._shutdown.until(self._backend.watch(after))) as events:
                yield b": watching\n\n"
                async for event in events:
                    yield frame(dataclasses.asdict(event), event.sequence)

    async def apply(self, request: Request) -> Response:
        """Make a planned change; the response comes when it is done. Only for callers that may operate the server."""
        body = await self._operator_body(request)
        serving = await self._backend.apply(Instruction.from_json(body))
        status = await answered(self._backend.status())
        version = status.weights_version
        return JSONResponse({"serving": serving, "epoch": status.epoch, "weights_version": version})

    async def report(self, request: Request) -> Response:
        """Take the report of a device's error. Only for callers that may operate the server."""
        body = await self._operator_body(request)
        response = await answered(self._backend.report(DeviceError.from_json(body)))
        return JSONResponse({"action": response.value})

    async def _operator_body(self, request: Request) -> Any:
        _require_json(request)
        status = await answered(self._backend.status())
        check_may_operate(
            chaos=status.chaos,
            operable=status.operable,
            key=CALLER.get(),
            peer=request.client.host if request.client else "",
        )
        return await read_json(request)

    async def kill(self, request: Request) -> Response:
        """Kill or stop a rank, or all ranks of a host, of a server started with --chaos."""
        _require_json(request)
        body = await read_json(request)
        names = ("rank", "host") if isinstance(body, dict) else ()
        victim = next((name for name in names if type(body.get(name)) is {"rank": int, "host": str}[name]), None)
        if victim is None or body.keys() - {victim, "signal"}:
            text = 'the body must be {"rank": number, "signal": "SIGKILL" or "SIGSTOP"}, or {"host": name, ...}.'
            raise InvalidRequest(text, param="rank")
        signal = body.get("signal", "SIGKILL")
        if signal not in SIGNALS + SIGNALS_TO_WEIGHTS:
            known = ", ".join(SIGNALS + SIGNALS_TO_WEIGHTS)
            raise InvalidRequest(f"signal is {signal!r}; it must be one of {known}.", param="signal")
        await self._backend.kill(body.get("rank", 0), signal, body.get("host", ""))
        return JSONResponse({"killed": body[victim]})


def _require_json(request: Request) -> None:
    """Refuse a body that does not say it is JSON: a page of another site can send only other types from a browser."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "send the body as Content-Type: application/json.")
