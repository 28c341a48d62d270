import asyncio
import contextlib

import pytest

from serving.core.call_records import StreamItem
from serving.core.output_streams import OutputStreams
from serving.core.request_log import RequestLog
from serving.errors import Internal
from serving.protocol.request import Finished, Token

pytestmark = pytest.mark.anyio

END = Finished("length")


def token(index: int, *, degraded: bool = False) -> Token:
    return Token(index=index, id=60 + index, logprob=0.0, epoch=0, degraded=degraded)


async def follow(output_streams: OutputStreams, past: tuple[StreamItem, ...] = ()) -> tuple["asyncio.Task[list]", list]:
    """A reader of request "a", and what it has got."""
    got: list = []

    async def read() -> list:
        async with contextlib.aclosing(output_streams.read("a", past)) as items:
            async for item in items:
                got.append(item)
        return got

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    return task, got


async def test_every_reader_has_the_past_and_then_all_that_comes_until_the_end():
    gone: list[str] = []
    output_streams = OutputStreams(RequestLog(None), gone.append)
    first, _ = await follow(output_streams)
    second, _ = await follow(output_streams, (token(0),))
    output_streams.send([("a", token(1)), ("b", token(0)), ("a", END)])
    assert await first == [token(1), END]
    assert await second == [token(0), token(1), END]
    assert gone == []
    assert output_streams.open_requests == ()
    assert (output_streams.tokens, output_streams.finished, output_streams.failed) == (2, 1, 0)


async def test_an_error_ends_a_request_for_its_reader_and_is_counted():
    output_streams = OutputStreams(RequestLog(None), lambda _: None)
    reader, got = await follow(output_streams)
    output_streams.send([("a", token(0, degraded=True)), ("a", Internal("broken"))])
    with pytest.raises(Internal, match="broken"):
        await reader
    assert got == [token(0, degraded=True)]
    assert (output_streams.finished, output_streams.failed, output_streams.degraded) == (0, 1, 1)


async def test_a_request_is_abandoned_when_its_last_reader_leaves():
    gone: list[str] = []
    output_streams = OutputStreams(RequestLog(None), gone.append)
    readers = [(await follow(output_streams))[0] for _ in range(2)]
    for left, reader in zip(([], ["a"]), readers, strict=True):
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        assert gone == left
    assert output_streams.open_requests == ()


async def test_the_first_step_of_a_request_is_known_while_it_is_read():
    output_streams = OutputStreams(RequestLog(None), lambda _: None)
    output_streams.record_step(["a"], 1.0)  # which nobody reads
    reader, _ = await follow(output_streams)
    assert output_streams.first_step_at("a") is None
    output_streams.record_step(["a", "b"], 2.0)
    output_streams.record_step(["a"], 3.0)
    assert (output_streams.first_step_at("a"), output_streams.first_step_at("b")) == (2.0, None)
    output_streams.send([("a", token(0)), ("a", END)])
    await reader
    assert output_streams.first_step_at("a") is None
