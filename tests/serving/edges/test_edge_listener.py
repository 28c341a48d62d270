"""Edges on other hosts: who is let in, what a stranger can do, fronts that die, servers that end, and other clocks."""

import asyncio
import contextlib
import dataclasses
import random
import shutil
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from serving.auth.tls import ClientTls
from serving.config import Settings
from serving.edges import edge_listener, messages
from serving.edges.absence import LATE_S
from serving.edges.connection import GONE_S, MAX_FRAME_BYTES, Connection
from serving.edges.edge_listener import HELLO_BYTES, MAX_STRANGERS, EdgeListener
from serving.edges.front_dialer import RemoteFront
from serving.edges.remote_backend import RemoteBackend
from serving.edges.served_model import ServedModel
from serving.errors import DeadlineExceeded, Draining, Internal, InvalidRequest, NotPermitted, StartError
from serving.launch.run_folder import RunFolder
from serving.protocol import clock
from serving.protocol.events import Event
from serving.protocol.instructions import DeviceError, Instruction
from serving.protocol.request import Call, Finished, Request
from serving.protocol.tensors import TensorUpdate
from serving.protocol.versions import EDGE
from simulation.hand_model import PREPARED
from tests.serving.edges.fronts import SERVED, Front, seen
from tests.serving.edges.test_remote_backend import LIMIT_S, check, read, tokens
from tests.support.joining import JoinFiles
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_processes")]
TINY = Path(__file__).parents[3] / "models" / "tiny"
OTHER_CLOCK_S = 1e6
"""By how much the clock of an edge's host differs."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> JoinFiles:
    return JoinFiles.made(tmp_path_factory.mktemp("files"), "127.0.0.1")


def settings(files: JoinFiles, *, tls: bool = True) -> Settings:
    given = files.settings("127.0.0.1:0")
    tokens = given["rank_tokens"]
    paths = {name: path for name, path in given.items() if name.startswith("rank_tls")} if tls else {}
    return Settings(edge_listen="127.0.0.1:0", edge_tokens=tokens, **paths)


async def listen(front: Front, files: JoinFiles, port: int = 0, *, tls: bool = True) -> EdgeListener:
    listener = EdgeListener(settings(files, tls=tls), f"127.0.0.1:{port}")
    await listener.open(front.socket.admit)
    return listener


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


class Elsewhere(RemoteFront):
    """The front, seen from a host with another monotonic clock."""

    def since(self) -> float:
        return clock.now() + OTHER_CLOCK_S


def dialer(files: JoinFiles, port: int, secret: str = "") -> Elsewhere:
    names = {"ca": "ca.pem", "cert": "host.pem", "key": "host.key"}
    tls = ClientTls(**{name: files.folder / file for name, file in names.items()}).context()
    return Elsewhere(f"127.0.0.1:{port}", secret or files.secret, tls)


@contextlib.asynccontextmanager
async def edge(files: JoinFiles, port: int) -> AsyncIterator[RemoteBackend]:
    """An edge on another host that serves."""
    backend = RemoteBackend(dialer(files, port))
    await backend.open()
    backend.serve()
    try:
        yield backend
    finally:
        await backend.close()


@contextlib.asynccontextmanager
async def served(folder: Path, files: JoinFiles) -> AsyncIterator[tuple[Front, EdgeListener]]:
    front = await Front.start(folder)
    listener = await listen(front, files)
    try:
        async with asyncio.timeout(LIMIT_S):
            yield front, listener
    finally:
        listener.close()
        await front.stop()


async def last(events: AsyncIterator[Event]) -> None:
    async for _ in events:
        pass


async def begun(backend: RemoteBackend, request: Request) -> tuple[list, "asyncio.Task[list]"]:
    """A call whose first tokens have come."""
    call, items = Call(id=request.id, requests=(request,)), []
    backend.register_call(call)
    task = asyncio.create_task(read(backend, call, request, items))
    await seen(lambda: items or task.done())
    return items, task


async def test_an_edge_on_another_host_is_served_and_no_moment_of_one_clock_is_read_by_the_other(
    tmp_path: Path, files: JoinFiles
) -> None:
    async with served(tmp_path, files) as (front, listener), edge(files, listener.port) as backend:
        assert backend.served == SERVED
        request = dataclasses.replace(front.machine.requests[0], deadline=clock.now() + OTHER_CLOCK_S + 60)
        call = Call(id=request.id, requests=(request,), owner="me")
        backend.register_call(call)
        items = []
        async for item in backend.stream(request):
            items.append(item)
            at = backend.first_step_at(request.id)
            assert at is None or abs(at - OTHER_CLOCK_S - clock.now()) < LIMIT_S
        check(request, items)
        [held] = front.loop.engine.request_log.find_call(call.id, "me").requests
        assert held.deadline is not None
        assert 0 < held.deadline - clock.now() < 61
        found = await backend.find_call(call.id, "me")
        assert found.requests[0].deadline == pytest.approx(request.deadline, abs=5)
        assert [(each.host, each.serving) for each in (await backend.status()).edges] == [(socket.gethostname(), True)]
        assert not front.socket.serving.is_set(), "the front waits for an edge of its own machine"
        for asked in (
            backend.kill(0),
            backend.apply(Instruction(action="pause")),
            backend.begin_tensors(TensorUpdate()),
            backend.apply_tensors(TensorUpdate(), str(tmp_path)),
            backend.report(DeviceError(rank=0, level=5)),
        ):
            with pytest.raises(NotPermitted, match="another host"):
                await asked
        await until(lambda: len(front.started) == 1)


async def test_both_sides_have_the_kernel_notice_a_host_that_vanishes(tmp_path: Path, files: JoinFiles) -> None:
    async with served(tmp_path, files) as (front, listener), edge(files, listener.port) as backend:
        for connection in (backend._connection, *front.socket._edges):
            assert connection is not None
            assert connection._transport is not None
            tcp = connection._transport.get_extra_info("socket")
            assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            probes_s = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            probes_s += tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) * tcp.getsockopt(
                socket.IPPROTO_TCP, socket.TCP_KEEPCNT
            )
            assert probes_s == GONE_S == tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1e3


async def test_fronts_die_and_the_edge_goes_on_at_the_next_one(tmp_path: Path, files: JoinFiles) -> None:
    front = await Front.start(tmp_path)
    listener = await listen(front, files)
    port = listener.port
    async with asyncio.timeout(LIMIT_S), edge(files, port) as backend:
        reading = [(request, *await begun(backend, request)) for request in front.machine.requests]
        for _ in range(2):
            listener.close()
            await front.kill()
            front = await Front.start(tmp_path, front)
            listener = await listen(front, files, port)
            await until(lambda: not backend.recovering)
        for request, items, task in reading:
            await task
            check(request, items)
        for request in front.machine.requests:
            backend.close_call(request.id)
        await until(lambda: [each.calls for each in front.socket.edges] == [0])
    listener.close()
    await front.stop()


async def test_a_server_that_ends_leaves_the_edge_waiting_for_the_next_one(tmp_path: Path, files: JoinFiles) -> None:
    front = await Front.start(made(tmp_path / "first"))
    listener = await listen(front, files)
    async with asyncio.timeout(LIMIT_S), edge(files, listener.port) as backend:
        events = backend.watch()
        await anext(events)
        asking = asyncio.create_task(anext(backend.replay("unknown")))
        await until(lambda: any(each.tasks for each in front.socket._edges.values()))
        listener.close()
        await front.stop()
        for asked in (asking, backend.status()):
            with pytest.raises(Draining):
                await asked
        with pytest.raises(Draining):
            await last(events)
        frames = set()
        for _ in range(3):
            with pytest.raises(Draining) as raised:
                await backend.status()
            frames.add(len(raised.traceback))
        assert len(frames) == 1, "the error keeps what each of its readers had in hand"
        assert backend.recovering
        front = await Front.start(made(tmp_path / "second"))
        listener = await listen(front, files, listener.port)
        await until(lambda: not backend.recovering)
        request = front.machine.requests[0]
        check(request, await read(backend, Call(id="a", requests=(request,)), request))
    listener.close()
    await front.stop()


INT8 = dataclasses.replace(PREPARED, cache_format="int8").to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"server": "two"},
        {"server": "two", "build": "2"},
        {"server": "two", "prepared": INT8},
        {"server": "two", "tensor": 2},
        {"files": "others"},
    ],
)
async def test_a_new_server_goes_on_with_answers_only_if_it_computes_the_same(
    tmp_path: Path, files: JoinFiles, change: dict[str, str | int]
) -> None:
    front = await Front.start(made(tmp_path / "first"))
    listener = await listen(front, files)
    async with asyncio.timeout(LIMIT_S), edge(files, listener.port) as backend:
        request = front.machine.requests[0]
        items, task = await begun(backend, request)
        listener.close()
        await front.kill()
        front = await Front.start(made(tmp_path / "second"))  # nothing is known of the call there
        front.socket._served = msgspec.structs.replace(SERVED, **change)
        listener = await listen(front, files, listener.port)
        if "files" in change:
            await backend.refused.wait()
            with pytest.raises(StartError, match="other settings than before: files"):
                await task
        elif len(change) > 1:
            with pytest.raises(Internal, match=f"it runs {change.get('build', 1)}, where 1 began it"):
                await task
        else:
            await task
            check(request, items)
        assert [token.index for token in tokens(items)] == list(range(len(tokens(items))))
    listener.close()
    await front.stop()


async def test_a_call_closed_on_a_connection_that_was_dead_already_is_closed_at_the_next_front(
    tmp_path: Path, files: JoinFiles
) -> None:
    front = await Front.start(tmp_path)
    listener = await listen(front, files)
    async with asyncio.timeout(LIMIT_S), edge(files, listener.port) as backend:
        request = front.machine.requests[0]
        _, task = await begun(backend, request)
        connection = backend._connection
        assert connection is not None
        connection._closing = True  # nothing that is sent leaves
        backend.close_call(request.id)
        connection.abort()
        task.cancel()
        log = front.loop.engine.request_log
        await until(lambda: front.socket._edges and log.items(request.id)[-1] == Finished("cancelled"))
        listener.close()
    await front.stop()


async def test_a_deadline_ends_a_request_at_the_edge_while_no_front_is_there(tmp_path: Path, files: JoinFiles) -> None:
    front = await Front.start(tmp_path)
    listener = await listen(front, files)
    async with asyncio.timeout(LIMIT_S), edge(files, listener.port) as backend:
        late, other = front.machine.requests[:2]
        late = dataclasses.replace(late, deadline=clock.now() + OTHER_CLOCK_S + 60)
        (_, task), (_, waiting) = await begun(backend, late), await begun(backend, other)
        listener.close()
        await front.kill()
        await until(lambda: backend.recovering)
        [reader] = (each for each in backend._readers.values() if each.request_id == late.id)
        assert reader.deadline == late.deadline
        reader.deadline = clock.now() - LATE_S
        with pytest.raises(DeadlineExceeded):
            await task
        assert not waiting.done()
        waiting.cancel()


async def test_an_edge_that_connects_again_takes_the_place_of_its_dead_connection(
    tmp_path: Path, files: JoinFiles
) -> None:
    async with served(tmp_path, files) as (front, listener):
        front_of_edge = dialer(files, listener.port)
        first, second = [], []
        for got in (first, second):
            connection = await front_of_edge.dial(lambda _, frame, got=got: got.append(frame), lambda _: None)
            connection.send(front_of_edge.hello())
            await until(lambda got=got: got)
            connection.send(messages.Serving(again=got is second))
        await until(lambda: len(front.socket._edges) == 1)
        assert front.lost == []
        connection.send(messages.EdgeEnding())
        await until(lambda: not front.socket.edges[0].serving)
        connection.close()
        await until(lambda: front.lost)
        assert "edge_ended" in {event.kind for event in front.loop.events.retained()}


# -- Strangers --------------------------------------------------------------------------------------------------


async def test_an_edge_without_a_valid_token_is_refused_and_ends(tmp_path: Path, files: JoinFiles) -> None:
    async with served(tmp_path, files) as (front, listener):
        late = files.tokens.add("late", valid_s=0.001)
        time.sleep(0.002)
        for secret, why in (("mjr_wrong", "no join token of this server"), (late, "'late' has expired")):
            backend = RemoteBackend(dialer(files, listener.port, secret))
            with pytest.raises(StartError, match=why):
                await backend.open()
            assert backend.refused.is_set()
            await backend.close()
        files.tokens.remove("late")
        assert not front.socket._edges


async def test_another_version_is_refused_with_both_numbers(tmp_path: Path, files: JoinFiles) -> None:
    async with served(tmp_path, files) as (_, listener):
        other = dialer(files, listener.port)
        hello = msgspec.structs.replace(other.hello(), version=EDGE.newest + 5, oldest=EDGE.newest + 5)
        other.hello = lambda: hello  # type: ignore[method-assign]
        backend = RemoteBackend(other)
        with pytest.raises(StartError, match=rf"version {EDGE.newest + 5} .* version {EDGE}\."):
            await backend.open()
        await backend.close()


class Stranger:
    """A connection without TLS that says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> "Stranger":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def is_left_after(self, data: bytes = b"") -> bool:
        """Whether the front ends the connection without a word after these bytes."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()
            return await self.reader.read() == b""
        return True


def framed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


async def test_nothing_is_obeyed_before_a_hello_and_garbage_harms_nobody(
    tmp_path: Path, files: JoinFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = await Front.start(tmp_path)
    listener = await listen(front, files, tls=False)
    draw = random.Random(7)
    ask = messages.Ask(number=1, method="status", arguments=msgspec.Raw(msgspec.msgpack.encode(())))
    hello = messages.encode(messages.Hello(version=1, pid=1, token=files.secret))
    cases = [
        framed(messages.encode(messages.Serving()), hello),
        framed(messages.encode(ask), hello),
        framed(messages.encode(messages.CloseCall(call_id="a"))),
        framed(b""),
        framed(messages.encode(messages.Hello(version=1, pid=1, token="x" * HELLO_BYTES))),
        (HELLO_BYTES + 1).to_bytes(4, "big"),
        MAX_FRAME_BYTES.to_bytes(4, "big"),
        b"GET / HTTP/1.1\r\n\r\n",
        *(framed(draw.randbytes(draw.randrange(200))) for _ in range(40)),
        *(framed(bytes(byte ^ (draw.random() < 0.05) for byte in hello)[: draw.randrange(1, 40)]) for _ in range(40)),
    ]
    async with asyncio.timeout(LIMIT_S):
        for case in cases:
            assert await (await Stranger.connect(listener.port)).is_left_after(case), case
        wrong = messages.encode(messages.Hello(version=1, pid=1, token="mjr_wrong"))
        guessing = await Stranger.connect(listener.port)
        guessing.writer.write(framed(wrong, hello, hello))
        refused = messages.Refused(text="the front does not let this edge in: this is no join token of this server.")
        assert await guessing.reader.read() == framed(messages.encode(refused)), "one guess for each connection"
        assert not front.socket._edges
        monkeypatch.setattr(edge_listener, "HELLO_S", 0.05)
        for silent in (b"", b"\0", hello[:10]):
            assert await (await Stranger.connect(listener.port)).is_left_after(silent)
        monkeypatch.setattr(edge_listener, "HELLO_S", 60.0)
        waiting = [await Stranger.connect(listener.port) for _ in range(MAX_STRANGERS + 1)]
        assert await waiting[0].is_left_after()
        assert not front.socket._edges
        backend = RemoteBackend(Elsewhere(f"127.0.0.1:{listener.port}", files.secret, None))
        await backend.open()
        assert (await backend.status()).ready
        await backend.close()
        for each in waiting:
            each.writer.close()
    listener.close()
    await front.stop()


async def test_peers_that_begin_no_tls_are_counted_from_the_start_and_keep_no_edge_out(
    tmp_path: Path, files: JoinFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, files) as (front, listener):
        waiting = [await Stranger.connect(listener.port) for _ in range(MAX_STRANGERS + 6)]
        for each in waiting[:6]:
            assert await each.is_left_after()
        await until(lambda: len(listener._strangers) == MAX_STRANGERS)
        async with edge(files, listener.port) as backend:
            assert (await backend.status()).ready
            assert await waiting[6].is_left_after(), "the one that has waited longest makes room"
            assert len(listener._strangers) == MAX_STRANGERS - 1
            monkeypatch.setattr(edge_listener, "HELLO_S", 0.05)
            for silent in (b"", b"\x16\x03", b"no TLS"):
                assert await (await Stranger.connect(listener.port)).is_left_after(silent)
            assert len(front.socket._edges) == 1
        for each in waiting:
            each.writer.close()
        await until(lambda: not listener._strangers)


async def test_what_a_let_in_edge_says_wrongly_ends_its_connection_alone(tmp_path: Path, files: JoinFiles) -> None:
    async with served(tmp_path, files) as (front, listener), edge(files, listener.port) as other:
        for wrong in (messages.Read(stream=1, call_id="none", request_id="none"), messages.OpenCall(call=b"{}")):
            got, lost = [], asyncio.Event()
            bad = dialer(files, listener.port)
            connection = await bad.dial(lambda _, frame, got=got: got.append(frame), lambda _, lost=lost: lost.set())
            connection.send(bad.hello())
            await until(lambda got=got: got)
            connection.send(wrong)
            await lost.wait()
        request = front.machine.requests[0]
        check(request, await read(other, Call(id="a", requests=(request,)), request))


async def test_an_edge_without_the_certificate_or_with_a_wrong_authority_does_not_connect(
    tmp_path: Path, files: JoinFiles
) -> None:
    async with served(tmp_path, files) as (front, listener):
        for tls in (
            ClientTls(ca=files.folder / "ca.pem"),
            ClientTls(ca=files.folder / "other-ca.pem", cert=files.folder / "host.pem", key=files.folder / "host.key"),
            None,
        ):
            gone = asyncio.Event()
            front_of_edge = RemoteFront(
                f"127.0.0.1:{listener.port}", files.secret, None if tls is None else tls.context()
            )
            with contextlib.suppress(OSError):
                connection: Connection = await front_of_edge.dial(lambda *_: None, lambda _, gone=gone: gone.set())
                connection.send(front_of_edge.hello())
                await gone.wait()
        assert not front.socket._edges


# -- Settings and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"edge_listen": "7"}, "must be host:port"),
        ({"edge_listen": "127.0.0.1:0"}, "needs edge_tokens"),
        ({"edge_tokens": "t"}, "without edge_listen"),
        ({"edge_listen": "127.0.0.1:0", "edge_tokens": "t", "edges": 0}, "edges 0"),
        ({"edge_listen": "127.0.0.1:0", "edge_tokens": "t", "supervise": False}, "--no-supervise"),
        ({"edge_listen": "0.0.0.0:0", "edge_tokens": "t"}, "without TLS"),
    ],
)
def test_settings_that_edges_on_other_hosts_lack_are_named(given: dict, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        Settings(**given)


def test_the_files_of_a_model_on_another_host_must_be_the_fronts(tmp_path: Path) -> None:
    model = dataclasses.replace(PREPARED, folder=str(TINY))
    template = tmp_path / "given.jinja"
    template.write_text("{{ messages }}")
    given = Settings(chat_template=str(template), tool_call_parser="hermes")
    sent = ServedModel.of(given, model, RunFolder(tmp_path))
    sent.settings["of_a_later_version"] = True
    ours, values = sent.model(None, tmp_path)
    assert "of_a_later_version" not in values
    assert (ours, values["tool_call_parser"]) == (model, "hermes")
    assert Path(values["chat_template"]).read_text() == template.read_text()
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("params", "held_out"))
    assert sent.model(str(copy), tmp_path)[0].folder == str(copy)
    (copy / "chat_template.jinja").write_text("another")
    with pytest.raises(StartError, match="another tokenizer, chat template"):
        sent.model(str(copy), tmp_path)
    with pytest.raises(StartError, match=r"no folder .*none.* --model"):
        sent.model(str(tmp_path / "none"), tmp_path)
