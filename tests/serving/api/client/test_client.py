"""Client and AsyncClient against a real gRPC server."""

import asyncio
import dataclasses

import numpy as np
import pytest

from serving import errors
from serving.api.client import AsyncClient, Client
from serving.errors import Unreachable
from serving.protocol.events import Event
from serving.text.tokenizer import Message
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve
from tests.support.waiting import until


def test_generate_is_the_whole_answer(server):
    with Client(server) as client:  # a running server is a target, too
        answer = client.generate("a", max_tokens=3, seed=11)
    assert (answer.text, answer.token_ids, answer.reason) == ("bcd", (98, 99, 100), "length")
    assert (answer.prompt_tokens, answer.completion_tokens, answer.seed) == (1, 3, 11)
    assert answer.logprobs == (-0.5, -0.5, -0.5)


def test_a_stream_has_its_end_after_the_chunks(server):
    with Client(server.address) as client:
        stream = client.stream((97,), max_tokens=2)
        assert stream.complete is None
        assert [chunk.text for chunk in stream] == ["b", "c"]
        assert stream.complete.reason == "length"


def test_leaving_a_stream_cancels_its_request(server, backend):
    backend.delay_s = 0.01
    with Client(server.address) as client:
        stream = client.stream("a")
        for _ in stream:
            break
        asyncio.run(until(lambda: not backend.running))
    assert list(backend.ended.values()) == ["left"]


def test_a_stop_string_may_be_plain_text(server, backend):
    backend.reply = list(b"one two")
    with Client(server.address) as client:
        assert client.generate("a", stop="two").text == "one "


def test_chat_takes_text_or_messages(server, backend):
    backend.reply = list(b"yes")
    with Client(server.address) as client:
        assert client.chat("hi").text == "yes"
        assert client.chat([Message("system", "s"), Message("user", "hi")]).text == "yes"
    assert backend.requests[0].prompt == (258, *b"hi", 256, 260)


def test_tokens_of_a_prompt_are_those_that_an_answer_goes_on_from(server, backend):
    with Client(server.address) as client:
        assert client.tokenize("hi") == (104, 105)
        assert client.detokenize(np.array([104, 105])) == "hi"
        turns = client.tokenize([{"role": "user", "content": "hi"}])
        client.chat("hi")
        assert backend.requests[-1].prompt == turns
        assert client.tokenize("") == ()
        with pytest.raises(errors.InvalidRequest, match="which are its tokens"):
            client.tokenize([1, 2])
        for wrong in ("hi", [1.5], [-1], [10**6], [10**12]):
            with pytest.raises(errors.InvalidRequest) as caught:
                client.detokenize(wrong)
            assert caught.value.param in ("ids", "token_ids")

    async def side_by_side():
        async with AsyncClient(server.address) as client:
            return await asyncio.gather(client.tokenize("hi"), client.detokenize([104]))

    assert asyncio.run(side_by_side()) == [(104, 105), "h"]


def test_status_and_model_are_the_servers_own(server, backend):
    with Client(server.address) as client:
        assert client.status() == backend.status()
        assert client.model() == dataclasses.replace(backend.model, has_chat_template=True)


def test_kill_is_seen_by_watch(server):
    with Client(server.address) as client:
        client.kill(2, "SIGSTOP")
        events = client.watch()
        assert [next(events).kind, next(events).kind] == ["rank_lost", "recovered"]
        events.close()
        later = next(client.watch(after=1))
    assert isinstance(later, Event)
    assert list(later.phases) == ["detect", "fence", "abort", "plan", "adopt", "resume"]


@pytest.mark.parametrize(
    ("arguments", "kind", "param"),
    [
        ({"prompt": ""}, errors.InvalidRequest, "prompt"),
        ({"prompt": [300]}, errors.InvalidRequest, "prompt"),
        ({"prompt": [-1]}, errors.InvalidRequest, None),
        ({"prompt": "x" * 256}, errors.PromptTooLong, "prompt"),
        ({"prompt": "x", "top_p": 2.0}, errors.InvalidRequest, "top_p"),
        ({"prompt": "x", "max_tokens": 2**40}, errors.InvalidRequest, None),
        ({"prompt": "x", "request_id": "x" * 200}, errors.InvalidRequest, "request_id"),
        ({"prompt": "x" * (5 << 20)}, errors.InvalidRequest, None),
        ({"prompt": "\ud800"}, errors.InvalidRequest, None),
    ],
)
def test_what_the_server_refuses_is_raised_as_its_class(server, arguments, kind, param):
    with Client(server.address) as client, pytest.raises(kind) as caught:
        client.generate(**arguments)
    assert type(caught.value) is kind
    assert caught.value.param == param


def test_a_deadline_is_raised(server, backend):
    backend.delay_s = 0.02
    with Client(server.address) as client, pytest.raises(errors.DeadlineExceeded):
        client.generate("a", timeout_s=0.1)


def test_a_full_queue_says_when_to_come_back(server, backend):
    backend.max_queue = 0
    with Client(server.address) as client, pytest.raises(errors.QueueFull) as caught:
        client.generate("a")
    assert caught.value.retry_after_s == 1.5


def test_no_server_is_one_clear_error():
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(Unreachable, match=r"no moejax server answers at 127\.0\.0\.1:1"),
    ):
        client.status()


def test_an_unknown_sampling_field_is_the_callers_mistake(server):
    with Client(server.address) as client, pytest.raises(TypeError, match="temprature"):
        client.generate("a", temprature=1)


def test_a_closed_client_says_so(server):
    client = Client(server)
    client.close()
    client.close()
    for call in (client.status, lambda: client.generate("a"), lambda: list(client.watch())):
        with pytest.raises(Unreachable, match="is closed"):
            call()


def test_an_async_client_may_be_made_before_its_loop(server):
    client = AsyncClient(server)

    async def ask() -> str:
        async with client:
            return (await client.chat([{"role": "user", "content": "hi"}], max_tokens=1)).reason

    assert asyncio.run(ask()) == "length"
    with pytest.raises(Unreachable, match="is closed"):
        asyncio.run(ask())


@pytest.mark.anyio
async def test_the_async_client_does_the_same(backend):
    async with serve(backend) as server, AsyncClient(server) as client:
        answer = await client.generate("a", max_tokens=3)
        assert answer.text == "bcd"
        stream = client.stream("a", max_tokens=2)
        assert [chunk.text async for chunk in stream] == ["b", "c"]
        assert stream.complete.reason == "length"
        assert (await client.chat("hi", max_tokens=1)).completion_tokens == 1
        assert await client.status() == backend.status()
        assert await client.model() == dataclasses.replace(backend.model, has_chat_template=True)
        assert not await client.abort("nobody")
        await client.kill(0)
        events = client.watch()
        assert (await anext(events)).kind == "rank_lost"
        await events.aclose()
        with pytest.raises(errors.InvalidRequest):
            await client.generate("")


@pytest.mark.anyio
async def test_a_hundred_streams_share_one_connection(backend):
    async with serve(backend) as server, AsyncClient(server) as client:
        answers = await asyncio.gather(*(client.generate((n,), max_tokens=20) for n in range(100)))
    assert [a.token_ids for a in answers] == [tuple(range(n + 1, n + 21)) for n in range(100)]


@pytest.mark.anyio
async def test_a_burst_beyond_the_queue_is_refused_and_not_dropped():
    backend, burst = FakeBackend(max_queue=100), 1000
    backend.may_answer.clear()

    async def ask(client: AsyncClient) -> str:
        try:
            return (await client.generate("a", max_tokens=2)).reason
        except errors.MoejaxError as error:
            return type(error).__name__

    async with serve(backend) as server, AsyncClient(server) as client:
        calls = [asyncio.create_task(ask(client)) for _ in range(burst)]
        await until(lambda: sum(call.done() for call in calls) == burst - 100)
        backend.may_answer.set()
        ends = await asyncio.gather(*calls)
    assert (ends.count("QueueFull"), ends.count("length")) == (burst - 100, 100)
    assert backend.running == 0
