"""A peer that fails in the middle of a stream fails the request."""

import asyncio
import json

import httpx

from benchmarks.peers.llama_stream import play_llama
from benchmarks.streams import Ask, Trace


def played(events: list[dict]) -> Trace:
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)

    async def play() -> Trace:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, text=body))
        async with httpx.AsyncClient(transport=transport, base_url="http://llama") as client:
            return await play_llama(client, Ask("To be", 0.0, 0, 2))

    return asyncio.run(play())


def test_an_error_event_is_the_error_of_the_request() -> None:
    first = {"tokens_predicted": 1}
    assert played([first, {"error": {"code": 500, "message": "no slot"}}]).error == "no slot"
    assert played([first]).error == "1 tokens of 2"
    assert played([first, {"tokens_predicted": 2}]).error is None
