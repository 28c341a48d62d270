"""An edge's backend over fronts that die: each call is run once, each item comes once, and questions wait."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.core.request_processor import RequestProcessor
from serving.edges import messages
from serving.edges.connection import Connection
from serving.edges.front_dialer import LocalFront
from serving.edges.front_socket import FrontSocket
from serving.edges.remote_backend import RemoteBackend
from serving.errors import Draining, InvalidRequest, NoCapacity, StartError, UnknownRequest, Unreachable
from serving.observability.metrics import Metrics
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.sampling import SamplingParams
from serving.protocol.status import EdgeStatus
from serving.protocol.versions import VersionRange
from simulation.byte_tokenizer import byte_tokenizer
from simulation.hand_model import PREPARED, alone
from tests.serving.edges.fronts import Front, edge, seen
from tests.support.fake_backend import FakeBackend
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_processes")]
LIMIT_S = 60


@pytest.fixture
async def front(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Front]:
    front = await Front.start(tmp_path_factory.mktemp("run"))
    yield front
    await front.stop()


def folder_of(front: Front) -> Path:
    path = front.socket._path
    assert path is not None
    return path.parent


async def read(backend: RemoteBackend, call: Call, request: Request, items: list | None = None) -> list:
    """All items of a request of a call."""
    items = [] if items is None else items
    async for item in backend.stream(request):
        items.append(item)
    return items


def expected(request: Request) -> list[int]:
    return list(alone(request, PREPARED.max_context)[0])


def tokens(items: list) -> list[Token]:
    return [item for item in items if isinstance(item, Token)]


def check(request: Request, items: list) -> None:
    """The request's tokens, each once and in order, then one end."""
    assert [token.index for token in tokens(items)] == list(range(request.sampling.max_tokens))
    assert [token.id for token in tokens(items)] == expected(request)
    assert [item for item in items if isinstance(item, Finished)] == items[-1:] == [items[-1]]


async def test_an_edge_gets_what_the_loop_gives(front: Front) -> None:
    async with edge(folder_of(front)) as backend, asyncio.timeout(LIMIT_S):
        assert backend.model == front.loop.model
        assert backend.resumable
        for request in front.machine.requests:
            call = Call(id=request.id, requests=(request,), owner="me", form={"big": 10**30})
            backend.register_call(call)
            items = await read(backend, call, request)
            check(request, items)
            backend.close_call(call.id)
            found = await backend.find_call(call.id, "me")
            assert dataclasses.replace(found, key="") == call
            assert [item async for item in backend.replay(request.id)] == items
            with pytest.raises(UnknownRequest):
                await backend.find_call(call.id, "you")
        status = await backend.status()
        assert dataclasses.replace(status, edges=()) == dataclasses.replace(front.loop.status(), edges=())
        assert [each.calls for each in status.edges] == [0]
        assert await backend.what_if() == front.loop.what_if()
        assert await backend.deployment() == front.loop.deployment()
        assert not await backend.abort("nobody")
        assert len(front.started) == 1


async def test_scores_and_errors_are_those_of_the_backend(tmp_path_factory: pytest.TempPathFactory) -> None:
    behind, folder = FakeBackend(), tmp_path_factory.mktemp("run")
    socket = FrontSocket(behind, RequestProcessor(behind, byte_tokenizer(), Metrics(behind)))
    await socket.open(folder)
    try:
        async with edge(folder) as backend, asyncio.timeout(LIMIT_S):
            processor = RequestProcessor(backend, byte_tokenizer(), Metrics(behind), draw_seed=lambda: 7)
            request = await processor.accept("abcdef", SamplingParams(max_tokens=3, prompt_logprobs=1))
            behind.first_steps[request.id] = 4.5
            items = []
            async for item in backend.stream(request):
                items.append(item)
                assert isinstance(item, Scored) or backend.first_step_at(request.id) == 4.5
            assert items == behind.sent[request.id]
            assert isinstance(items[0], Scored)
            behind.fail_at[1] = NoCapacity("nobody", param="here", retry_after_s=2.5)
            with pytest.raises(NoCapacity) as failed:
                _ = [item async for item in backend.stream(dataclasses.replace(request, id="again"))]
            assert (str(failed.value), failed.value.param, failed.value.retry_after_s) == ("nobody", "here", 2.5)
    finally:
        await socket.close()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(kills=st.lists(st.integers(0, 60), min_size=1, max_size=3), edges=st.integers(1, 2))
async def test_fronts_may_die_at_any_time(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], edges: int
) -> None:
    """All calls are sent at once; a front dies after so many turns of the event loop: before it has received a call,
    while it accepts it, and in the middle of its tokens."""
    folder = tmp_path_factory.mktemp("run")
    front = await Front.start(folder)
    accepted: list[str] = []
    try:
        async with edge(folder) as one, edge(folder) as other, asyncio.timeout(LIMIT_S):
            reading: dict[str, tuple[Request, list, asyncio.Task[list]]] = {}
            for place, request in enumerate(front.machine.requests):
                backend = (one, other)[place % edges]
                call, items = Call(id=request.id, requests=(request,)), []
                backend.register_call(call)
                reading[request.id] = request, items, asyncio.create_task(read(backend, call, request, items))
            for turns in kills:
                for _ in range(turns):
                    await asyncio.sleep(0)
                await front.kill()
                front = await Front.start(folder, front)
                accepted += [request for request in reading if front.loop.has_begun(request)]
            for request, items, task in reading.values():
                await task
                check(request, items)
            log = front.loop.engine.request_log
            assert {call.id for call in log._history.calls.values()} == reading.keys(), "each call is recorded once"
            assert (await one.status()).failed == 0
    finally:
        await front.stop()


async def test_a_call_that_the_front_before_accepted_is_not_run_again(front: Front) -> None:
    folder, request = folder_of(front), front.machine.requests[0]
    async with edge(folder) as backend, asyncio.timeout(LIMIT_S):
        call, items = Call(id=request.id, requests=(request,)), []
        backend.register_call(call)
        task = asyncio.create_task(read(backend, call, request, items))
        await seen(lambda: front.loop.has_begun(request.id))
        await front.kill()
        second = await Front.start(folder, front)
        try:
            assert second.loop.has_begun(request.id), "the journal has it, whatever the edge has heard"
            await task
            check(request, items)
            assert (await backend.status()).finished == 1
        finally:
            await second.stop()


async def test_a_client_that_leaves_while_no_front_is_there_is_heard_of_by_the_next(front: Front) -> None:
    folder, request = folder_of(front), front.machine.requests[0]
    async with edge(folder) as backend, asyncio.timeout(LIMIT_S):
        call, items = Call(id=request.id, requests=(request,)), []
        backend.register_call(call)
        task = asyncio.create_task(read(backend, call, request, items))
        await seen(lambda: items)
        await front.kill()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        backend.close_call(call.id)
        second = await Front.start(folder, front)
        try:
            await until(lambda: not second.loop.engine.state.running and not second.loop.engine.state.waiting)
            assert len([i for i in second.loop.engine.request_log.items(request.id) if isinstance(i, Token)]) < len(
                expected(request)
            )
        finally:
            await second.stop()


async def test_a_client_that_leaves_ends_its_request(front: Front) -> None:
    request = front.machine.requests[0]
    async with edge(folder_of(front)) as backend, asyncio.timeout(LIMIT_S):
        call, items = Call(id=request.id, requests=(request,)), []
        backend.register_call(call)
        task = asyncio.create_task(read(backend, call, request, items))
        await seen(lambda: items)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        backend.close_call(call.id)
        await until(lambda: front.loop.engine.state.find(request.id) is None)
        assert front.loop.engine.request_log.items(request.id)[-1] == Finished("cancelled")


async def test_the_id_of_an_open_call_is_refused(front: Front) -> None:
    request = front.machine.requests[0]
    async with edge(folder_of(front)) as one, edge(folder_of(front)) as other, asyncio.timeout(LIMIT_S):
        call, items = Call(id=request.id, requests=(request,)), []
        one.register_call(call)
        task = asyncio.create_task(read(one, call, request, items))
        await seen(lambda: items)
        with pytest.raises(InvalidRequest, match="in use"):
            one.register_call(call)
        other.register_call(call)
        with pytest.raises(InvalidRequest):
            await read(other, call, request)
        other.close_call(call.id)
        await task
        check(request, items)


async def test_questions_wait_for_the_next_front_and_instructions_are_not_repeated(front: Front) -> None:
    folder = folder_of(front)
    async with edge(folder) as backend, asyncio.timeout(LIMIT_S):
        await front.kill()
        await until(lambda: backend.recovering)
        asking = asyncio.create_task(backend.status())
        second = await Front.start(folder, front)
        try:
            assert (await asking).front_pid
            assert not backend.recovering
            held = asyncio.Event()

            async def kill(rank: int, signal: str, host: str) -> None:
                held.set()
                await asyncio.sleep(60)

            second.loop.kill = kill  # type: ignore[method-assign]
            killing = asyncio.create_task(backend.kill(0))
            await held.wait()
        finally:
            await second.kill()
        with pytest.raises(Unreachable, match="kill"):
            await killing
    async with asyncio.timeout(LIMIT_S):
        impatient = RemoteBackend(LocalFront(folder), wait_s=0.01)
        with pytest.raises(Unreachable, match=r"0\.01 s"):
            await impatient.status()


async def test_watchers_get_the_events_of_every_front(front: Front) -> None:
    folder = folder_of(front)
    async with edge(folder) as backend, asyncio.timeout(LIMIT_S):
        events = backend.watch()
        first = [await anext(events)]
        await front.kill()
        second = await Front.start(folder, front)
        try:
            second.loop.events._sequence += 1000  # as the run folder has it
            second.loop.edge_lost(EdgeStatus(pid=1, serving=True, calls=2), False)
            while first[-1].kind != "edge_lost":
                first.append(await anext(events))
            assert first[-1].severity == "bad"
            assert len({event.sequence for event in first}) == len(first)
            await events.aclose()  # type: ignore[attr-defined]
        finally:
            await second.stop()


async def test_a_front_that_shuts_down_ends_what_is_open(front: Front) -> None:
    request = front.machine.requests[0]
    async with edge(folder_of(front)) as backend, asyncio.timeout(LIMIT_S):
        asking = asyncio.create_task(backend.replay("unknown").__anext__())
        await until(lambda: any(each.tasks for each in front.socket._edges.values()))
        await front.socket.close()
        with pytest.raises(Draining):
            await asking
        with pytest.raises(Draining):
            await read(backend, Call(id="a", requests=(request,)), request)


async def test_another_version_is_refused_with_both_numbers(front: Front) -> None:
    other, answers = messages.VERSION + 1, []
    ended = asyncio.Event()
    _, connection = await asyncio.get_running_loop().create_unix_connection(
        lambda: Connection(lambda _, frame: answers.append(messages.decode_from_front(frame)), lambda _: ended.set()),
        str(folder_of(front) / messages.SOCKET),
    )
    connection.send(messages.Hello(version=other, pid=1))
    async with asyncio.timeout(LIMIT_S):
        await ended.wait()
    assert [type(answer) for answer in answers] == [messages.Refused]
    assert f"version {other} " in answers[0].text
    assert f"version {messages.VERSION}." in answers[0].text


async def test_an_edge_that_is_refused_does_not_start(tmp_path_factory: pytest.TempPathFactory) -> None:
    def refuse(connection: Connection, _: bytes) -> None:
        connection.send(messages.Refused(text=messages.refusal(VersionRange(7, 7))))
        connection.close()

    folder = tmp_path_factory.mktemp("run")
    path = str(folder / messages.SOCKET)
    server = await asyncio.get_running_loop().create_unix_server(lambda: Connection(refuse, lambda _: None), path)
    backend = RemoteBackend(LocalFront(folder))
    async with server, asyncio.timeout(LIMIT_S):
        with pytest.raises(StartError, match="version 7 "):
            await backend.open()
        assert backend.refused.is_set()
        await backend.close()
