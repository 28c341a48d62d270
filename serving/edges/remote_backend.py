"""The `Backend` of an edge: the front, whichever process it is at the moment.

When a front dies, every open stream waits and is attached to the next front from the place that it has reached, so that
its client sees a pause. A call that no front has accepted yet is sent again with the same key, by which a front that
has accepted it knows it. Where the front is on another host, its server may end and another one begin; an edge beside
it ends with the server.
"""

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from typing import Any, cast

import msgspec

from planner.plan.pools import AnyDeployment
from serving.edges import messages
from serving.edges.absence import Absence
from serving.edges.connection import Connection
from serving.edges.front_dialer import FrontDialer
from serving.edges.reconnection import Reconnection
from serving.edges.served_model import ServedModel
from serving.edges.stream_reader import StreamReader
from serving.errors import Draining, Internal, InvalidRequest, MoejaxError, StartError, Unreachable
from serving.protocol.events import Event
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.status import LossForecast, Status
from serving.protocol.tensors import TensorTarget, TensorUpdate

WAIT_S = 20.0
"""Most seconds for which a question, such as the status, waits for the next front."""
NOT_REPEATED = ("kill", "apply", "begin_tensors", "apply_tensors", "report")
"""Instructions: they are not sent a second time, because the front that died may have carried them out."""

log = logging.getLogger(__name__)


class RemoteBackend:
    """See `serving.protocol.backend.Backend`. `open` it before its first use."""

    def __init__(self, front: FrontDialer, *, wait_s: float = WAIT_S) -> None:
        self.model: ModelInfo
        self.served: ServedModel | None = None
        """The model as a front on another host has sent it."""
        self.resumable = False
        self.refused = asyncio.Event()
        """Set when a front refuses this edge, for good."""
        self._front = front
        self._link = Reconnection(front, self._on_frame, self._detach)
        self._wait_s = wait_s
        self._connection: Connection | None = None
        self._opened = self._serving = False
        self._leaving = False
        self._ended: MoejaxError | None = None
        """Why nothing can be asked any more, or not before another front has come."""
        self._calls: dict[str, Call] = {}
        self._call_of_request: dict[str, str] = {}
        self._readers: dict[int, StreamReader] = {}
        self._absence = Absence(self._readers, remote=front.remote)
        self._asked: dict[int, tuple[messages.Ask, asyncio.Future[bytes]]] = {}
        self._first_steps: dict[str, float] = {}
        self._numbers = 0

    async def open(self) -> None:
        """Reach the first front, however long it takes. Raises StartError when it refuses this edge."""
        self._link.start()
        await self._link.welcomed.wait()
        if self.refused.is_set():
            self._check_ended()
        self._opened = True

    def serve(self) -> None:
        """Say to this front and the next ones that clients can connect."""
        self._serving = True
        self._send(messages.Serving())

    def leave(self) -> None:
        """This edge is to end: no more clients can connect. Where fronts are on another host, the present front and the
        next ones are sent a message that says so."""
        self._leaving = True
        if self._front.remote:
            self._send(messages.EdgeEnding())

    async def close(self) -> None:
        """End the connection. The front finishes what is open."""
        await self._link.stop()
        self._absence.end()
        self._end(Draining("the server is shutting down."))

    @property
    def recovering(self) -> bool:
        """See `serving.protocol.backend.Backend.recovering`. Also true once this edge is to end."""
        return self._connection is None or self._leaving

    # -- Calls --------------------------------------------------------------------------------------------------

    def register_call(self, call: Call) -> None:
        """See `serving.protocol.backend.Backend.register_call`. Raises InvalidRequest for the id of an open call."""
        if call.id in self._calls:
            raise InvalidRequest(f"the request id {call.id!r} is in use. Choose another.", param="request_id")
        call = self._calls[call.id] = dataclasses.replace(call, key=uuid.uuid4().hex)
        self._call_of_request |= {request.id: call.id for request in call.requests}
        self._open_call(call)

    def close_call(self, call_id: str) -> None:
        """See `serving.protocol.backend.Backend.close_call`."""
        call = self._calls.pop(call_id, None)
        if call is None:
            return
        for request in call.requests:
            del self._call_of_request[request.id]
        if self._ended is None:
            self._absence.closed(call, connected=self._connection is not None)
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
            async with contextlib.aclosing(self._read(opening, request.deadline)) as items:
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

    async def deployment(self) -> AnyDeployment | None:
        """See `serving.protocol.backend.Backend.deployment`."""
        return await self._ask("deployment")

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        """See `serving.protocol.backend.Backend.kill`."""
        await self._ask("kill", rank, signal, host)

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply`."""
        return await self._ask("apply", instruction)

    async def begin_tensors(self, update: TensorUpdate) -> TensorTarget:
        """See `serving.protocol.backend.Backend.begin_tensors`."""
        return await self._ask("begin_tensors", update)

    async def apply_tensors(self, update: TensorUpdate, folder: str) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply_tensors`."""
        return await self._ask("apply_tensors", update, folder)

    async def report(self, error: DeviceError) -> ErrorResponse:
        """See `serving.protocol.backend.Backend.report`."""
        return await self._ask("report", error)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """The answer of this front or, to a question, of the next one. Raises MoejaxError: that of the front, or
        Unreachable when none answers in time."""
        self._check_ended()
        number, made = self._next_number(), msgspec.Raw(messages.encode(arguments))
        ask = messages.Ask(number=number, method=method, arguments=made)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._wait_s) as limit:
                if self._connection is None and method in NOT_REPEATED:
                    await self._link.welcomed.wait()
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
        return answer_value if read is None else read(answer_value, self._front.since())

    # -- Streams ------------------------------------------------------------------------------------------------

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _reader(
        self, opening: messages.Read | messages.Replay | messages.Watch, deadline: float | None = None
    ) -> StreamReader:
        """A reader of a stream that is asked of this front, and of each one after it."""
        self._check_ended()
        reader = self._readers[opening.stream] = StreamReader(opening, deadline)
        self._send(opening)
        return reader

    async def _read(
        self, opening: messages.Read | messages.Replay, deadline: float | None = None
    ) -> AsyncGenerator[Scored | Token | Finished]:
        reader = self._reader(opening, deadline)
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

    def _open_call(self, call: Call) -> None:
        if self._connection is not None:
            self._send(messages.OpenCall(call=messages.call_record(call, self._front.since())))

    def _welcome(self, connection: Connection, welcome: messages.Welcome) -> None:
        """A front is there, perhaps one of another server."""
        before, served = self.served, welcome.served
        if before is not None and served is not None:
            if why := before.change_to(served):
                self._refuse(f"{why}. This edge ends; start it again.")
                return
            if not before.computes_as(served):
                error = Internal(
                    "the server that began this answer ended, and another one would compute it otherwise: it runs "
                    f"{served.build}, where {before.build} began it, on other processors, or with another cache or "
                    "other shards of layers. Send the request again."
                )
                for reader in self._readers.values():
                    if reader.begun:
                        reader.fail(error)
            if before.server != served.server:
                for reader in self._readers.values():
                    reader.begin_events()
        self.served = served
        self._attach(connection, welcome)

    def _attach(self, connection: Connection, welcome: messages.Welcome) -> None:
        """A front is there: it gets all that holds."""
        self._connection, self.model, self.resumable = connection, welcome.model, welcome.resumable
        self._ended = None
        self._absence.end()
        for call in self._absence.to_close():
            self._open_call(call)
            self._send(messages.CloseCall(call_id=call.id))
        for call in self._calls.values():
            self._open_call(call)
        for reader in self._readers.values():
            if not reader.ended:
                self._send(reader.opening())
        for ask, _ in self._asked.values():
            self._send(ask)
        if self._serving:
            self._send(messages.Serving(again=True))
        if self._leaving and self._front.remote:
            self._send(messages.EdgeEnding())
        connection.grant_unsent()
        self._link.welcomed.set()

    def _detach(self) -> None:
        """The front has gone. Questions wait for the next one; nobody knows how far instructions came."""
        if self._connection is None:
            return
        self._connection = None
        self._link.welcomed.clear()
        self._absence.begin()
        for ask, answer in self._asked.values():
            if ask.method in NOT_REPEATED and not answer.done():
                text = (
                    f"the front died while it carried this out ({ask.method}). Look at the status before you repeat it."
                )
                answer.set_exception(Unreachable(text))

    def _check_ended(self) -> None:
        """Raise why nothing can be asked, if so. One error ends many requests, and keeps the frames of none."""
        if self._ended is not None:
            raise self._ended.with_traceback(None)

    def _end(self, error: MoejaxError) -> None:
        """End all that is open with this error, and all that is asked before another front is there, if one comes."""
        self._ended = self._ended or error
        self._connection = None
        self._link.welcomed.clear()
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
                self._welcome(connection, message)
            case messages.Goodbye():
                self._end(Draining("the server shut down before the request was done."))
                connection.close()
            case messages.Refused():
                self._refuse(message.text)

    def _refuse(self, text: str) -> None:
        """This edge cannot be served, by no front."""
        if self._opened:  # else `open` raises it
            log.error("%s", text)
        self._end(StartError(text))
        self._link.over = True
        self.refused.set()
        self._link.welcomed.set()

    def _on_item(self, connection: Connection, message: Any) -> None:
        reader = self._readers.get(message.stream)
        if reader is None:
            return
        if isinstance(message, messages.TokenItem):
            at, age_s = message.first_step_at, message.first_step_age_s
            at = self._front.since() - age_s if age_s is not None else at
            if at is not None:
                self._first_steps.setdefault(cast(str, reader.request_id), at)
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
