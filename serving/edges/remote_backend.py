"""The `Backend` of an edge: the front, whichever process it is at the moment.

When a front dies, every open stream waits and is attached to the next front from the place that it has reached, so that
its client sees a pause. A call that no front has accepted yet is sent again with the same key, by which a front that
has accepted it knows it.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from pathlib import Path
from typing import Any, cast

import msgspec

from planner.plan.deployment import Deployment
from serving.edges import messages
from serving.edges.connection import Connection
from serving.edges.stream_reader import StreamReader
from serving.errors import Draining, InvalidRequest, MoejaxError, StartError, Unreachable
from serving.protocol.events import Event
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.status import LossForecast, Status
from serving.protocol.versions import EDGE
from serving.version import build

RETRY_S = 0.01
"""Seconds between two attempts to reach the next front."""
WAIT_S = 20.0
"""Most seconds for which a question, such as the status, waits for the next front."""
NOT_REPEATED = ("kill", "apply", "report")
"""Instructions: they are not sent a second time, because the front that died may have carried them out."""

log = logging.getLogger(__name__)


@dataclasses.dataclass
class HeldCall:
    """A call of this edge that has not been closed, and its record."""

    call: Call
    record: bytes


class RemoteBackend:
    """See `serving.protocol.backend.Backend`. `open` it before its first use; `folder` is the run folder."""

    def __init__(self, folder: Path, *, wait_s: float = WAIT_S) -> None:
        self.model: ModelInfo
        self.resumable = False
        self.refused = asyncio.Event()
        """Set when a front refuses this edge, for good."""
        self._path = str(folder / messages.SOCKET)
        self._wait_s = wait_s
        self._connection: Connection | None = None
        self._welcomed = asyncio.Event()
        self._serving = False
        self._ended: MoejaxError | None = None
        self._calls: dict[str, HeldCall] = {}
        self._call_of_request: dict[str, str] = {}
        self._closed_meanwhile: list[HeldCall] = []
        self._readers: dict[int, StreamReader] = {}
        self._asked: dict[int, tuple[messages.Ask, asyncio.Future[bytes]]] = {}
        self._first_steps: dict[str, float] = {}
        self._numbers = 0
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Reach the first front, however long it takes. Raises StartError when it refuses this edge."""
        self._task = asyncio.create_task(self._stay_connected())
        await self._welcomed.wait()
        if self.refused.is_set():
            assert self._ended is not None
            raise self._ended

    def serve(self) -> None:
        """Say to this front and the next ones that clients can connect."""
        self._serving = True
        self._send(messages.Serving())

    async def close(self) -> None:
        """End the connection. The front finishes what is open."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._connection is not None:
            self._connection.close()
        self._end(Draining("the server is shutting down."))

    @property
    def recovering(self) -> bool:
        """See `serving.protocol.backend.Backend.recovering`."""
        return self._connection is None

    # -- Calls --------------------------------------------------------------------------------------------------

    def register_call(self, call: Call) -> None:
        """See `serving.protocol.backend.Backend.register_call`. Raises InvalidRequest for the id of an open call."""
        if call.id in self._calls:
            raise InvalidRequest(f"the request id {call.id!r} is in use. Choose another.", param="request_id")
        call = dataclasses.replace(call, key=uuid.uuid4().hex)
        opened = self._calls[call.id] = HeldCall(call, messages.call_record(call))
        self._call_of_request |= {request.id: call.id for request in call.requests}
        self._send(messages.OpenCall(call=opened.record))

    def close_call(self, call_id: str) -> None:
        """See `serving.protocol.backend.Backend.close_call`."""
        opened = self._calls.pop(call_id, None)
        if opened is None:
            return
        for request in opened.call.requests:
            del self._call_of_request[request.id]
        if self._connection is None:
            self._closed_meanwhile.append(opened)
        self._send(messages.CloseCall(call_id=call_id))

    def fail_requests(self, request_ids: Collection[str], error: MoejaxError) -> None:
        """See `serving.protocol.backend.Backend.fail_requests`."""
        call_id = next((call for each in request_ids if (call := self._call_of_request.get(each))), None)
        if call_id is not None:
            made = messages.failed(0, error)
            self._send(messages.FailRequests(call_id=call_id, request_ids=tuple(request_ids), error=made))

    async def stream(self, request: Request) -> AsyncGenerator[Scored | Token | Finished]:
        """See `serving.protocol.backend.Backend.stream`."""
        call_id = self._call_of_request.get(request.id)
        alone = call_id is None
        if call_id is None:
            call_id = request.id
            self.register_call(Call(id=call_id, requests=(request,)))
        opening = messages.Read(stream=self._next_number(), call_id=call_id, request_id=request.id)
        try:
            async with contextlib.aclosing(self._read(opening)) as items:
                async for item in items:
                    yield item
        finally:
            self._first_steps.pop(request.id, None)
            if alone:
                self.close_call(call_id)

    async def replay(self, request_id: str, *, follow: bool = True) -> AsyncGenerator[Scored | Token | Finished]:
        """See `serving.protocol.backend.Backend.replay`."""
        opening = messages.Replay(stream=self._next_number(), request_id=request_id, follow=follow)
        async with contextlib.aclosing(self._read(opening)) as items:
            async for item in items:
                yield item

    def first_step_at(self, request_id: str) -> float | None:
        """See `serving.protocol.backend.Backend.first_step_at`."""
        return self._first_steps.get(request_id)

    async def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """See `serving.protocol.backend.Backend.watch`."""
        reader = self._reader(messages.Watch(stream=self._next_number(), after=after))
        try:
            while True:
                item = await reader.next()
                assert isinstance(item, Event)
                yield item
        finally:
            self._leave(reader)

    # -- Questions and instructions -----------------------------------------------------------------------------

    async def find_call(self, call_id: str, owner: str) -> Call:
        """See `serving.protocol.backend.Backend.find_call`."""
        return await self._ask("find_call", call_id, owner)

    async def forget_call(self, call_id: str) -> None:
        """See `serving.protocol.backend.Backend.forget_call`."""
        await self._ask("forget_call", call_id)

    async def abort(self, request_id: str) -> bool:
        """See `serving.protocol.backend.Backend.abort`. With the id of a call of another edge, all its requests end."""
        return await self._ask("abort", request_id)

    async def status(self) -> Status:
        """See `serving.protocol.backend.Backend.status`."""
        return await self._ask("status")

    async def what_if(self) -> tuple[LossForecast, ...]:
        """See `serving.protocol.backend.Backend.what_if`."""
        return await self._ask("what_if")

    async def deployment(self) -> Deployment | None:
        """See `serving.protocol.backend.Backend.deployment`."""
        return await self._ask("deployment")

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        """See `serving.protocol.backend.Backend.kill`."""
        await self._ask("kill", rank, signal, host)

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply`."""
        return await self._ask("apply", instruction)

    async def report(self, error: DeviceError) -> ErrorResponse:
        """See `serving.protocol.backend.Backend.report`."""
        return await self._ask("report", error)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """The answer of this front or, to a question, of the next one. Raises MoejaxError: that of the front, or
        Unreachable when none answers in time."""
        if self._ended is not None:
            raise self._ended
        number, made = self._next_number(), msgspec.Raw(messages.encode(arguments))
        ask = messages.Ask(number=number, method=method, arguments=made)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._wait_s) as limit:
                if self._connection is None and method in NOT_REPEATED:
                    await self._welcomed.wait()
                self._asked[number] = ask, answer
                self._send(ask)
                if method in NOT_REPEATED and self._connection is not None:
                    limit.reschedule(None)  # a planned change takes its time
                value = await answer
        except TimeoutError:
            raise Unreachable(f"no front has answered for {self._wait_s:g} s; one is being started.") from None
        finally:
            self._asked.pop(number, None)
        _, kind = messages.METHODS[method]
        answer_value = msgspec.msgpack.decode(value, type=kind)
        _, read = messages.RECORDED.get(method, (None, None))
        return answer_value if read is None else read(answer_value)

    # -- Streams ------------------------------------------------------------------------------------------------

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _reader(self, opening: messages.Read | messages.Replay | messages.Watch) -> StreamReader:
        """A reader of a stream that is asked of this front, and of each one after it."""
        if self._ended is not None:
            raise self._ended
        reader = self._readers[opening.stream] = StreamReader(opening)
        self._send(opening)
        return reader

    async def _read(self, opening: messages.Read | messages.Replay) -> AsyncGenerator[Scored | Token | Finished]:
        reader = self._reader(opening)
        try:
            while (item := await reader.next()) is not None:
                assert not isinstance(item, Event)
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            self._leave(reader)

    def _leave(self, reader: StreamReader) -> None:
        self._readers.pop(reader.stream, None)
        if not reader.ended:
            self._send(messages.Leave(stream=reader.stream))

    # -- The connection -----------------------------------------------------------------------------------------

    def _send(self, message: messages.EdgeMessage) -> None:
        """Send a message to the front. What is still true when there is none is sent to the next one."""
        if self._connection is not None:
            self._connection.send(message)

    async def _stay_connected(self) -> None:
        while self._ended is None:
            lost = asyncio.Event()
            loop = asyncio.get_running_loop()
            try:
                _, connection = await loop.create_unix_connection(
                    lambda lost=lost: Connection(self._on_frame, lambda _: lost.set()), self._path
                )
            except OSError:
                await asyncio.sleep(RETRY_S)
                continue
            try:
                connection.send(messages.Hello(version=EDGE.newest, oldest=EDGE.oldest, pid=os.getpid(), build=build()))
                await lost.wait()
            finally:
                self._detach()
                connection.close()

    def _attach(self, connection: Connection, welcome: messages.Welcome) -> None:
        """A front is there: it gets all that holds."""
        self._connection, self.model, self.resumable = connection, welcome.model, welcome.resumable
        for closed in self._closed_meanwhile:
            self._send(messages.OpenCall(call=closed.record))
            self._send(messages.CloseCall(call_id=closed.call.id))
        self._closed_meanwhile.clear()
        for opened in self._calls.values():
            self._send(messages.OpenCall(call=opened.record))
        for reader in self._readers.values():
            self._send(reader.opening())
        for ask, _ in self._asked.values():
            self._send(ask)
        if self._serving:
            self._send(messages.Serving(again=True))
        self._welcomed.set()

    def _detach(self) -> None:
        """The front has gone. Questions wait for the next one; nobody knows how far instructions came."""
        if self._connection is None:
            return
        self._connection = None
        self._welcomed.clear()
        for ask, answer in self._asked.values():
            if ask.method in NOT_REPEATED and not answer.done():
                text = (
                    f"the front died while it carried this out ({ask.method}). Look at the status before you repeat it."
                )
                answer.set_exception(Unreachable(text))

    def _end(self, error: MoejaxError) -> None:
        """No front will follow: what is open ends with this error."""
        self._ended = self._ended or error
        self._connection = None
        for reader in self._readers.values():
            reader.fail(error)
        for _, answer in self._asked.values():
            if not answer.done():
                answer.set_exception(error)

    def _on_frame(self, connection: Connection, frame: bytes) -> None:
        message = messages.decode_from_front(frame)
        match message:
            case messages.TokenItem() | messages.ScoredItem() | messages.FinishedItem() | messages.EventItem():
                self._on_item(connection, message)
            case messages.Ended():
                if (reader := self._readers.get(message.stream)) is not None:
                    reader.end()
            case messages.Failed():
                self._on_error(message)
            case messages.Answered():
                _, answer = self._asked.get(message.number, (None, None))
                if answer is not None and not answer.done():
                    answer.set_result(bytes(message.value))
            case messages.Welcome():
                self._attach(connection, message)
            case messages.Goodbye():
                self._end(Draining("the server shut down before the request was done."))
            case messages.Refused():
                log.error("%s", message.text)
                self._end(StartError(message.text))
                self.refused.set()
                self._welcomed.set()

    def _on_item(self, connection: Connection, message: Any) -> None:
        reader = self._readers.get(message.stream)
        if reader is None:
            return
        if isinstance(message, messages.TokenItem) and message.first_step_at is not None:
            self._first_steps.setdefault(cast(str, reader.request_id), message.first_step_at)
        if not reader.push(message):
            log.error("the front left out a part of a stream; the edge attaches again")
            connection.abort()

    def _on_error(self, message: messages.Failed) -> None:
        error = messages.error_of(message)
        if (reader := self._readers.get(message.stream)) is not None:
            reader.fail(error)
        _, answer = self._asked.get(message.stream, (None, None))
        if answer is not None and not answer.done():
            answer.set_exception(error)
