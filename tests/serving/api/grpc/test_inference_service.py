"""A stream of tokens: its parts, its deadline, and every way in which a client ends it."""

import dataclasses

import grpc
import grpc.aio
import pytest

from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc
from tests.support.fake_backend import MODEL, FakeBackend
from tests.support.fake_server import serve
from tests.support.grpc_clients import connected, rest_of
from tests.support.grpc_requests import asking
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def test_a_stream_has_tokens_text_logprobs_and_one_end(backend):
    async with connected(backend) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        answers = [a async for a in stub.Generate(asking("a", max_tokens=2, seed=5))]
    chunk, end = answers[1].chunk, answers[-1].complete
    assert (list(chunk.token_ids), chunk.text, list(chunk.logprobs)) == ([99], "c", [-0.5])
    assert (chunk.first_index, chunk.epoch) == (1, 0)
    assert end.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (end.seed, list(end.epochs)) == (5, [0])


async def test_the_deadline_of_the_call_is_the_requests(backend):
    backend.delay_s = 0.02
    async with connected(backend) as (_, channel):
        stub, timeout_s = inference_pb2_grpc.InferenceStub(channel), 0.2
        while not backend.requests:  # on a busy machine the deadline may pass before the server has the call
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Generate(asking(), timeout=timeout_s):
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            timeout_s *= 2
        await until(lambda: not backend.running)
    assert backend.requests[0].deadline is not None


async def test_abort_ends_the_other_stream(backend):
    backend.delay_s = 0.01
    async with connected(backend) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = asking()
        request.request_id = "mine"
        call = stub.Generate(request)
        await call.read()
        assert (await stub.Abort(inference_pb2.AbortRequest(request_id="mine"))).aborted
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest_of(call)
        assert not (await stub.Abort(inference_pb2.AbortRequest(request_id="mine"))).aborted
    assert caught.value.code() is grpc.StatusCode.CANCELLED


async def test_a_client_that_cancels_ends_its_request(backend):
    backend.delay_s = 0.01
    async with connected(backend) as (_, channel):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(asking())
        await call.read()
        call.cancel()
        await until(lambda: not backend.running)
    assert list(backend.ended.values()) == ["left"]


async def test_a_client_that_vanishes_ends_its_request(backend):
    backend.delay_s = 0.01
    async with serve(backend) as server:
        channel = grpc.aio.insecure_channel(server.address)
        call = inference_pb2_grpc.InferenceStub(channel).Generate(asking())
        await call.read()
        await channel.close(grace=None)
        await until(lambda: not backend.running)


async def test_a_client_that_never_reads_is_held_back_and_hurts_nobody():
    backend = FakeBackend(model=dataclasses.replace(MODEL, max_context=20_000, stop_tokens=()))
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 << 10))
    async with connected(backend) as (server, channel):
        idle_channel = grpc.aio.insecure_channel(server.address, options=small_window)
        idle = inference_pb2_grpc.InferenceStub(idle_channel).Generate(asking())
        await until(lambda: backend.running == 1)
        stub, made, held = inference_pb2_grpc.InferenceStub(channel), 0, 0
        while held < 5:  # flow control holds it: others are served, and it makes no token
            other = [a async for a in stub.Generate(asking("a", max_tokens=5))]
            assert other[-1].complete.usage.completion_tokens == 5
            before, made = made, backend.made(backend.requests[0].id)
            held = held + 1 if 0 < made == before else 0
        assert made < 10_000
        idle.cancel()
        await until(lambda: not backend.running)
        await idle_channel.close()
