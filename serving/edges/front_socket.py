"""The front's side of the connections of edges: each is an edge, with the calls that it has open.

An edge that dies leaves calls behind. Where calls are recorded they run to their end without a reader, as those do that
an earlier front left, so that their clients can resume them at any edge; else they are cancelled.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import msgspec

from serving.core.call_records import UnreadableCall
from serving.core.request_processor import RequestProcessor
from serving.edges import messages
from serving.edges.connection import Connection
from serving.edges.served_model import ServedModel
from serving.edges.stream_reader import after_position
from serving.errors import Internal, InvalidRequest, MoejaxError, NotPermitted, UnknownRequest
from serving.protocol import clock
from serving.protocol.backend import FrontBackend, answered
from serving.protocol.events import Event
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.status import EdgeStatus
from serving.protocol.versions import EDGE

CLOSE_S = 2.0
"""Most seconds that a front which stops waits for its edges to take what they lack."""

INSTRUCTIONS = ("kill", "apply", "begin_tensors", "apply_tensors", "report")
"""The methods that change the server. An edge on another host, whose port is open to clients, may not ask for them."""

log = logging.getLogger(__name__)


class Edge:
    """An edge that is connected: its process id, its open calls by id, and the tasks that send to it by stream. One on
    another host has its name."""

    def __init__(self, connection: Connection, host: str = "") -> None:
        self.connection = connection
        self.host = host
        self.pid = 0
        self.id = ""
        self.build = ""
        self.serving = False
        self.leaving = False
        self.calls: dict[str, Call] = {}
        self.refused: dict[str, InvalidRequest] = {}
        """By id, open calls that this front cannot read."""
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.streams: dict[str, list[int]] = {}
        """Streams by the id of their open call."""

    @property
    def since(self) -> float:
        """The time that is subtracted from deadlines which are sent to it or come from it (`messages.call_record`)."""
        return clock.now() if self.host else 0.0

    @property
    def status(self) -> EdgeStatus:
        """Its status."""
        return EdgeStatus(pid=self.pid, serving=self.serving, calls=len(self.calls), build=self.build, host=self.host)

    def send(self, message: messages.EdgeMessage) -> None:
        """Send a message to the edge, if it is still there."""
        self.connection.send(message)

    def send_token(self, stream: int, token: Token, first_step_at: float | None) -> None:
        """Send a token, and when its request left the queue, on the monotonic clock of this machine."""
        if first_step_at is None or not self.host:
            self.send(messages.TokenItem(stream=stream, token=token, first_step_at=first_step_at))
        else:
            age_s = clock.now() - first_step_at
            self.send(messages.TokenItem(stream=stream, token=token, first_step_age_s=age_s))


class FrontSocket:
    """Serves a backend to edges. `processor` reads the calls that an edge leaves behind; `on_started` gets the status
    of a new edge once clients can connect to it, `on_lost` that of one that has gone, and whether it had said so.
    `served` is for edges on other hosts."""

    def __init__(
        self,
        backend: FrontBackend,
        processor: RequestProcessor,
        *,
        on_started: Callable[[EdgeStatus], object] = lambda _: None,
        on_lost: Callable[[EdgeStatus, bool], object] = lambda *_: None,
        served: ServedModel | None = None,
    ) -> None:
        self.serving = asyncio.Event()
        """Set once clients can connect to an edge of this machine."""
        self._served = served
        self._lost: set[str] = set()
        """Ids of edges on other hosts whose loss was reported."""
        self._backend = backend
        self._processor = processor
        self._on_started = on_started
        self._on_lost = on_lost
        self._edges: dict[Connection, Edge] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._closing = False

    @property
    def edges(self) -> tuple[EdgeStatus, ...]:
        """The edges that are connected."""
        return tuple(edge.status for edge in self._edges.values() if edge.pid)

    async def open(self, folder: Path) -> None:
        """Listen in the run folder, in the place of the front before this one."""
        self._path = folder / messages.SOCKET
        self._path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Connection(self._on_frame, self._on_gone), str(self._path))

    async def close(self) -> None:
        """Say goodbye: the server ends, and no front follows."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        for edge in self._edges.values():
            edge.send(messages.Goodbye())
            edge.connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._edges:
                    await asyncio.sleep(0.005)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def admit(self, connection: Connection, hello: messages.Hello) -> None:
        """Serve an edge on another host from now on, whose token is valid. A connection that it had before is ended:
        the edge has lost it, and this front does not know that yet."""
        for edge in list(self._edges.values()):
            if edge.id and edge.id == hello.id:
                edge.id = ""
                edge.connection.abort()
        connection.on_frame, connection.on_lost = self._on_frame, self._on_gone
        edge = self._edges[connection] = Edge(connection, hello.host)
        edge.id = hello.id
        self._welcome(edge, hello)

    # -- Messages -----------------------------------------------------------------------------------------------

    def _on_frame(self, connection: Connection, frame: bytes) -> None:
        if self._closing and connection not in self._edges:
            connection.abort()  # an edge that comes while this front ends would wait for what nobody sends
            return
        edge = self._edges.setdefault(connection, Edge(connection))
        message = messages.decode_from_edge(frame)
        match message:
            case messages.Hello() if not edge.host:
                self._welcome(edge, message)
            case messages.Serving():
                edge.serving = True
                if not edge.host:
                    self.serving.set()
                if not message.again or edge.id in self._lost:
                    self._lost.discard(edge.id)
                    self._on_started(edge.status)
            case messages.EdgeEnding():
                edge.serving, edge.leaving = False, True
            case messages.OpenCall():
                try:
                    call = messages.call_of_record(message.call, edge.since)
                except UnreadableCall as error:
                    edge.refused[error.call_id] = error.error
                else:
                    edge.calls[call.id] = call
            case messages.CloseCall():
                self._close_call(edge, message.call_id)
            case messages.FailRequests():
                call = edge.calls.get(message.call_id)
                if call is not None and self._is_recorded(call):
                    self._backend.fail_requests(message.request_ids, messages.error_of(message.error))
            case messages.Read():
                self._read(edge, message)
            case messages.Replay():
                items = self._backend.replay(message.request_id, follow=message.follow)
                self._begin(edge, message.stream, self._pump(edge, message, items))
            case messages.Watch():
                self._begin(edge, message.stream, self._pump_events(edge, message))
            case messages.Leave():
                if (task := edge.tasks.pop(message.stream, None)) is not None:
                    task.cancel()
            case messages.Ask():
                self._keep(self._answer(edge, message))

    def _welcome(self, edge: Edge, hello: messages.Hello) -> None:
        common = EDGE.common_with(hello.versions)
        if common is None:
            edge.send(messages.Refused(text=messages.refusal(hello.versions)))
            edge.connection.close()
            return
        edge.pid, edge.build = hello.pid, hello.build
        backend = self._backend
        served = self._served if edge.host else None
        edge.send(messages.Welcome(version=common, model=backend.model, resumable=backend.resumable, served=served))

    def _read(self, edge: Edge, message: messages.Read) -> None:
        """Replay a request that was accepted before; accept it otherwise."""
        if (error := edge.refused.get(message.call_id)) is not None:
            edge.send(messages.failed(message.stream, error))
            return
        call = edge.calls[message.call_id]
        request = next(each for each in call.requests if each.id == message.request_id)
        edge.streams.setdefault(call.id, []).append(message.stream)
        self._begin(edge, message.stream, self._pump(edge, message, self._items(call, request)))

    def _items(self, call: Call, request: Request) -> AsyncIterator[Scored | Token | Finished]:
        if self._is_recorded(call) and self._backend.has_begun(request.id):
            return self._backend.replay(request.id)
        self._backend.register_call(call)
        return self._backend.stream(request)

    def _is_recorded(self, call: Call) -> bool:
        """True when the log has this call, and not another one with its id."""
        logged = self._logged(call)
        return logged is not None and logged.key == call.key

    def _logged(self, call: Call) -> Call | None:
        """The call that the log has under the id of this one."""
        try:
            return self._backend.find_call(call.id, call.owner)
        except UnknownRequest:
            return None

    def _close_call(self, edge: Edge, call_id: str) -> None:
        edge.refused.pop(call_id, None)
        call = edge.calls.pop(call_id, None)
        edge.streams.pop(call_id, None)
        if call is None:
            return
        logged = self._logged(call)
        if logged is not None:
            if logged.key != call.key:
                return  # the id is another call's
            for request in call.requests:
                self._backend.abort(request.id)
        self._backend.close_call(call.id)

    # -- Tasks --------------------------------------------------------------------------------------------------

    def _begin(self, edge: Edge, stream: int, work: Coroutine[Any, Any, None]) -> None:
        edge.tasks[stream] = task = self._keep(work)
        task.add_done_callback(lambda _: edge.tasks.pop(stream, None))

    def _keep(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _pump(
        self,
        edge: Edge,
        message: messages.Read | messages.Replay,
        source: AsyncIterator[Scored | Token | Finished],
    ) -> None:
        """Send the items that the edge lacks."""
        stream, tokens = message.stream, message.tokens
        left_queue = self._backend.first_step_at
        try:
            async with contextlib.aclosing(cast(AsyncGenerator[Scored | Token | Finished, None], source)) as items:
                async for item in items:
                    if isinstance(item, Token):
                        if item.index == 0 < tokens:
                            _check_weights(message, item)
                        if item.index >= tokens:
                            edge.send_token(
                                stream, item, None if item.index > tokens else left_queue(message.request_id)
                            )
                    elif isinstance(item, Scored):
                        rest = after_position(item, message.scored)
                        if rest is not None:
                            edge.send(messages.ScoredItem(stream=stream, scored=rest))
                    else:
                        edge.send(messages.FinishedItem(stream=stream, finished=item))
                        return
            edge.send(messages.Ended(stream=stream))
        except MoejaxError as error:
            edge.send(messages.failed(stream, error))
        except Exception:
            log.exception("a stream of an edge failed")
            edge.send(messages.failed(stream, Internal("internal error; the server's log has the details.")))

    async def _pump_events(self, edge: Edge, message: messages.Watch) -> None:
        async with contextlib.aclosing(cast(AsyncGenerator[Event, None], self._backend.watch(message.after))) as events:
            async for event in events:
                edge.send(messages.EventItem(stream=message.stream, event=dataclasses.asdict(event)))

    async def _answer(self, edge: Edge, ask: messages.Ask) -> None:
        try:
            if ask.method not in messages.METHODS:
                raise InvalidRequest(f"an edge asks for {ask.method!r}, which this front does not know.")
            if edge.host and ask.method in INSTRUCTIONS:
                raise NotPermitted(
                    f"this edge is on another host ({edge.host}) and may not change the server. Ask the server's own "
                    "ports, on the host of its front."
                )
            arguments = msgspec.msgpack.decode(ask.arguments, type=messages.METHODS[ask.method][0])
            method = self._abort if ask.method == "abort" else getattr(self._backend, ask.method)
            answer = await answered(method(*arguments))
            made, _ = messages.RECORDED.get(ask.method, (None, None))
            value = messages.encode(answer if made is None else made(answer, edge.since))
            edge.send(messages.Answered(number=ask.number, value=msgspec.Raw(value)))
        except MoejaxError as error:
            edge.send(messages.failed(ask.number, error))
        except Exception:
            log.exception("a question of an edge failed")
            edge.send(messages.failed(ask.number, Internal("internal error; the server's log has the details.")))

    def _abort(self, request_id: str) -> bool:
        """Cancel a request, or all requests of an open call with this id, whichever edge has it."""
        calls = [call for edge in self._edges.values() if (call := edge.calls.get(request_id)) is not None]
        ids = {request_id: None} | {request.id: None for call in calls for request in call.requests}
        return sum(self._backend.abort(each) for each in ids) > 0  # all of them, not the first alone

    # -- Edges that go ------------------------------------------------------------------------------------------

    def _on_gone(self, connection: Connection) -> None:
        edge = self._edges.pop(connection, None)
        if edge is None:
            return
        reading = {stream for streams in edge.streams.values() for stream in streams}
        for stream, task in list(edge.tasks.items()):
            if self._closing or stream not in reading:
                task.cancel()
        if self._closing:
            return
        if (edge.serving or edge.leaving) and (edge.id or not edge.host):
            self._lost |= {edge.id} - {""}
            self._on_lost(edge.status, edge.leaving)
        for call in edge.calls.values():
            self._keep(self._finish(edge, call))

    async def _finish(self, edge: Edge, call: Call) -> None:
        """Run a call to its end that has lost its edge, with all of its requests. Its tasks stay readers of it until
        then, so that it never has none."""
        tasks = [task for stream in edge.streams.get(call.id, ()) if (task := edge.tasks.get(stream)) is not None]
        try:
            if self._is_recorded(call):
                for request in call.requests:
                    if not self._backend.has_begun(request.id):
                        opening = messages.Read(stream=0, call_id=call.id, request_id=request.id)
                        tasks.append(self._keep(self._pump(edge, opening, self._items(call, request))))
                await self._processor.read_unattended([call])
        finally:
            for task in tasks:
                task.cancel()


def _check_weights(message: messages.Read | messages.Replay, token: Token) -> None:
    """Raise Internal for an answer that is computed again, because nothing was recorded of it, and with other weights
    than its client has tokens of."""
    had = message.weights_version if isinstance(message, messages.Read) else ""
    if had not in ("", token.weights_version):
        raise Internal(
            f"the answer began with weights version {had}; its front died, no journal has it, and version "
            f"{token.weights_version} is in force. Send the request again, or start the server with a journal."
        )
