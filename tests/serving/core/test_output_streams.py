import asyncio
import contextlib

import pytest

from serving.delivery import Delivery
from serving.errors import Internal
from serving.ledger import Item, Ledger
from serving.request import Finished, Token

pytestmark = pytest.mark.anyio

END = Finished("length")


def token(index: int, *, degraded: bool = False) -> Token:
    return Token(index=index, id=60 + index, logprob=0.0, epoch=0, degraded=degraded)


async def follow(delivery: Delivery, past: tuple[Item, ...] = ()) -> tuple["asyncio.Task[list]", list]:
    """A reader of request "a", and what it has got."""
    got: list = []

    async def read() -> list:
        async with contextlib.aclosing(delivery.read("a", past)) as items:
            async for item in items:
                got.append(item)
        return got

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    return task, got


async def test_every_reader_has_the_past_and_then_all_that_comes_until_the_end():
    gone: list[str] = []
    delivery = Delivery(Ledger(None), gone.append)
    first, _ = await follow(delivery)
    second, _ = await follow(delivery, (token(0),))
    delivery.tell([("a", token(1)), ("b", token(0)), ("a", END)])
    assert await first == [token(1), END]
    assert await second == [token(0), token(1), END]
    assert gone == []
    assert delivery.awaited == ()
    assert (delivery.tokens, delivery.finished, delivery.failed) == (2, 1, 0)


async def test_an_error_ends_a_request_for_its_reader_and_is_counted():
    delivery = Delivery(Ledger(None), lambda _: None)
    reader, got = await follow(delivery)
    delivery.tell([("a", token(0, degraded=True)), ("a", Internal("broken"))])
    with pytest.raises(Internal, match="broken"):
        await reader
    assert got == [token(0, degraded=True)]
    assert (delivery.finished, delivery.failed, delivery.degraded) == (0, 1, 1)


async def test_a_request_is_abandoned_when_its_last_reader_leaves():
    gone: list[str] = []
    delivery = Delivery(Ledger(None), gone.append)
    readers = [(await follow(delivery))[0] for _ in range(2)]
    for left, reader in zip(([], ["a"]), readers, strict=True):
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        assert gone == left
    assert delivery.awaited == ()
