"""An edge dies: what it had open runs on without it, once, and can be resumed at another edge."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.edges import messages
from serving.edges.connection import Connection
from serving.edges.front_dialer import LocalFront
from serving.edges.remote_backend import RemoteBackend
from serving.errors import InvalidRequest, NoCapacity
from serving.protocol.request import Call, Finished, Request
from serving.protocol.sampling import ResolvedSampling
from tests.serving.edges.fronts import Front, edge, seen
from tests.serving.edges.test_remote_backend import LIMIT_S, check, folder_of, read
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_processes")]


@pytest.fixture
async def front(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Front]:
    front = await Front.start(tmp_path_factory.mktemp("run"))
    yield front
    await front.stop()


async def test_calls_of_an_edge_that_dies_are_resumed_at_another_one(front: Front) -> None:
    folder, requests = folder_of(front), front.machine.requests
    async with edge(folder) as other, asyncio.timeout(LIMIT_S):
        dying = RemoteBackend(LocalFront(folder))
        await dying.open()
        dying.serve()
        pair = Call(id=requests[0].id, requests=tuple(requests[:2]))
        alone = Call(id=requests[2].id, requests=(requests[2],))
        got: dict[str, list] = {request.id: [] for request in requests[:2]}
        dying.register_call(pair)
        reading = [asyncio.create_task(read(dying, pair, r, got[r.id])) for r in pair.requests]
        other.register_call(alone)
        undisturbed = asyncio.create_task(read(other, alone, requests[2]))
        await seen(lambda: all(got.values()))
        assert dying._connection is not None
        dying._connection.abort()
        assert dying._link._task is not None
        dying._link._task.cancel()
        await until(lambda: len(front.lost) > 0)
        assert front.lost[0][1] == 1
        found = await other.find_call(pair.id, "")
        for request in found.requests:
            check(request, [item async for item in other.replay(request.id)])
        check(requests[2], await undisturbed)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        assert (await other.status()).finished == 3, "each request has run once"


async def test_what_an_edge_had_not_begun_of_a_call_is_run_too(front: Front) -> None:
    folder, (first, second, *_) = folder_of(front), front.machine.requests
    async with edge(folder) as other, asyncio.timeout(LIMIT_S):
        dying = RemoteBackend(LocalFront(folder))
        await dying.open()
        call, items = Call(id=first.id, requests=(first, second)), []
        dying.register_call(call)
        task = asyncio.create_task(read(dying, call, first, items))
        await seen(lambda: items)
        assert not front.loop.has_begun(second.id)
        assert dying._connection is not None
        assert dying._link._task is not None
        dying._link._task.cancel()
        dying._connection.abort()
        await until(lambda: front.loop.has_begun(second.id))
        for request in (first, second):
            check(request, [item async for item in other.replay(request.id)])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_abort_at_another_edge_ends_all_requests_of_a_call(front: Front) -> None:
    folder, requests = folder_of(front), front.machine.requests[:3]
    async with edge(folder) as one, edge(folder) as other, asyncio.timeout(LIMIT_S):
        call = Call(id="the-call", requests=tuple(requests))
        got: dict[str, list] = {request.id: [] for request in requests}
        one.register_call(call)
        reading = [asyncio.create_task(read(one, call, request, got[request.id])) for request in requests]
        await seen(lambda: all(got.values()))
        assert await other.abort("the-call")
        await asyncio.gather(*reading)
        assert {items[-1] for items in got.values()} <= {Finished("cancelled"), Finished("length")}
        assert Finished("cancelled") in {items[-1] for items in got.values()}


async def test_nothing_that_is_sent_harms_the_front(front: Front) -> None:
    path = str(folder_of(front) / messages.SOCKET)
    wrong = (
        b"\x00\x00\x00\x01\xff",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x05hello",
        _frame(messages.Read(stream=1, call_id="none", request_id="none")),
        _frame(messages.OpenCall(call=b"{}")),
    )
    async with asyncio.timeout(LIMIT_S):
        for data in wrong:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(data)
            assert await reader.read() == b"", data
            writer.close()
        async with edge(Path(path).parent) as backend:
            assert (await backend.status()).ready
            with pytest.raises(Exception, match="does not know"):
                await asked(backend)


async def test_a_call_that_needs_what_this_front_does_not_know_is_refused_alone(front: Front) -> None:
    folder, request = folder_of(front), front.machine.requests[0]
    newer = messages.call_record(Call(id=request.id, requests=(request,)))
    newer = newer.replace(b'"seed":', b'"unheard_of":1,"seed":', 1)
    async with asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_unix_connection(str(folder / messages.SOCKET))
        writer.write(_frame(messages.Hello(version=1, pid=1)))
        writer.write(_frame(messages.OpenCall(call=newer)))
        writer.write(_frame(messages.Read(stream=1, call_id=request.id, request_id=request.id)))
        received = []
        while not any(isinstance(message, messages.Failed) for message in received):
            size = int.from_bytes(await reader.readexactly(4), "big")
            received.append(messages.decode_from_front(await reader.readexactly(size)))
        error = messages.error_of(received[-1])
        assert isinstance(error, InvalidRequest)
        assert "unheard_of" in str(error)
        writer.write(_frame(messages.CloseCall(call_id=request.id)))
        writer.close()
        async with edge(folder) as backend:
            call, items = Call(id=request.id, requests=(request,)), []
            backend.register_call(call)
            await read(backend, call, request, items)
            check(request, items)


def test_a_record_names_nothing_that_has_its_default() -> None:
    request = Request(id="a", prompt=(1,), sampling=ResolvedSampling(max_tokens=3, seed=1, top_k=4))
    record = messages.call_record(Call(id="a", requests=(request,)))
    assert b"top_k" in record
    assert b"top_p" not in record
    assert messages.call_of_record(record).requests == (request,)


async def asked(backend: RemoteBackend) -> None:
    """A question that the front does not know."""
    messages_known = messages.METHODS
    assert "unheard_of" not in messages_known
    await backend._ask("unheard_of")


def _frame(message: messages.EdgeMessage) -> bytes:
    data = messages.encode(message)
    return len(data).to_bytes(4, "big") + data


def test_a_connection_that_has_ended_takes_messages_and_sends_none() -> None:
    connection = Connection(lambda *_: None, lambda _: None)
    connection.send(messages.Serving())
    connection.close()
    connection.abort()
    assert not connection.open


async def test_the_error_of_one_answer_is_that_of_the_other_ones_of_its_call(front: Front) -> None:
    folder, requests = folder_of(front), front.machine.requests[:2]
    async with edge(folder) as backend, asyncio.timeout(LIMIT_S):
        call = Call(id=requests[0].id, requests=tuple(requests))
        got: dict[str, list] = {request.id: [] for request in requests}
        backend.register_call(call)
        reading = [asyncio.create_task(read(backend, call, request, got[request.id])) for request in requests]
        await seen(lambda: all(got.values()))
        backend.fail_requests([request.id for request in requests], NoCapacity("nobody"))
        ends = await asyncio.gather(*reading, return_exceptions=True)
        assert all(isinstance(end, NoCapacity) for end in ends)
