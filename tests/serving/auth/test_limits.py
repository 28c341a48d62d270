"""Bounds that one client cannot take from the others: places, sizes, patience."""

import asyncio
import dataclasses
import json
import socket

import grpc
import grpc.aio
import httpx
import pytest

from serving.api.client import AsyncClient
from serving.auth.limits import CallLimits
from serving.config import Settings
from serving.core.request_processor import RequestProcessor
from serving.errors import InvalidRequest, PromptTooLong, QueueFull
from serving.observability.metrics import Metrics
from serving.proto.moejax.v1 import inference_pb2_grpc
from serving.protocol.sampling import SamplingParams
from tests.support.fake_backend import FakeBackend, model_named
from tests.support.fake_server import serve
from tests.support.grpc_requests import asking
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

STREAM = {"prompt": "a", "stream": True, "max_tokens": 200}


def bounded(**settings) -> CallLimits:
    return CallLimits.of(Settings(**settings))


async def test_streams_of_both_surfaces_share_the_places(backend):
    backend.delay_s, limits = 0.02, bounded(max_streams=2)
    async with serve(backend, limits=limits) as server, httpx.AsyncClient(base_url=server.url) as client:
        async with AsyncClient(server.address) as caller:
            first = aiter(caller.stream("a"))
            await anext(first)
            async with client.stream("POST", "/v1/completions", json=STREAM) as second:
                assert second.status_code == 200
                third = await client.post("/v1/completions", json=STREAM)
                assert (third.status_code, third.headers["retry-after"]) == (429, "1")
                with pytest.raises(QueueFull, match="--max-streams"):
                    await caller.generate("a")
                assert (await client.get("/health")).status_code == 200
            await until(lambda: limits.streams == 1)
            assert (await caller.generate("a", max_tokens=1)).text == "b"
            await first.aclose()
        await until(lambda: limits.streams == 0)


@pytest.mark.parametrize("fault", ["error", "refused", "left"])
async def test_a_place_is_given_back_however_the_call_ends(backend, fault):
    limits = bounded(max_streams=1)
    backend.delay_s = 0.01 if fault == "left" else 0.0
    if fault == "error":
        backend.fail_at[1] = InvalidRequest("x")
    body = STREAM | ({"temperature": -1} if fault == "refused" else {})
    async with serve(backend, limits=limits) as server, httpx.AsyncClient(base_url=server.url) as client:
        for _ in range(3):
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == (400 if fault == "refused" else 200)
                await anext(answer.aiter_bytes())
            await until(lambda: limits.streams == 0)
            async with grpc.aio.insecure_channel(server.address) as channel:
                sampling = {"temperature": -1} if fault == "refused" else {}
                call = inference_pb2_grpc.InferenceStub(channel).Generate(asking("a", **sampling))
                with pytest.raises(grpc.aio.AioRpcError) if fault == "refused" else _nothing():
                    await call.read()
                call.cancel()
            await until(lambda: limits.streams == 0)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_exc: object) -> None: ...


async def test_a_body_is_limited_with_or_without_a_content_length():
    async def parts():
        for _ in range(20):
            yield b" " * 100

    limits = bounded(max_body_bytes=1000)
    async with serve(FakeBackend(), limits=limits) as server, httpx.AsyncClient(base_url=server.url) as client:
        for content in (b" " * 2000, parts()):
            assert (await client.post("/v1/completions", content=content)).status_code == 413
        assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
        async with AsyncClient(server.address) as caller:
            with pytest.raises(InvalidRequest, match="larger than max"):  # gRPC's own words
                await caller.generate("x" * 2000)


async def test_headers_are_bounded():
    limits = bounded(max_header_bytes=2000)
    async with serve(FakeBackend(), limits=limits) as server, httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/live", headers={"X-Long": "x" * 4000})).status_code == 431
        assert (await client.get("/live")).status_code == 200


async def test_a_prompt_is_bounded_by_the_setting(tokenizer, backend):
    processor = RequestProcessor(backend, tokenizer, Metrics(backend), max_prompt_tokens=3)
    await processor.accept("abc", SamplingParams())
    with pytest.raises(PromptTooLong, match="at most 3"):
        await processor.accept("abcd", SamplingParams())


async def test_a_body_that_does_not_come_is_given_up(backend):
    async with serve(backend, limits=bounded(slow_client_s=0.2)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 60)
        writer.close()
    assert backend.requests == []


async def test_a_reader_that_stops_ends_its_request_and_hurts_nobody():
    model = dataclasses.replace(model_named("fake"), max_context=1 << 20)
    backend, limits = FakeBackend(model=model, reply=[97] * 1_000_000), bounded(slow_client_s=0.5)
    async with serve(backend, limits=limits) as server:
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", server.http_port))
        body = json.dumps(STREAM | {"max_tokens": 1_000_000}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        stuck.sendall(head.encode() + body)
        await until(lambda: backend.running == 1)
        async with AsyncClient(server.address) as caller:
            assert len((await caller.generate("a", max_tokens=50)).token_ids) == 50
        await until(lambda: backend.running == 0 and limits.streams == 0)
        stuck.close()
    assert next(iter(backend.ended.values())) == "left"
