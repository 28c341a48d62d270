"""Errors arrive as a status with the field, the reason and the time to come back, and never with a defect's text."""

import contextlib

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings

from serving.errors import Internal
from serving.proto.moejax.v1 import inference_pb2, resilience_pb2, resilience_pb2_grpc
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve_in_thread
from tests.support.grpc_clients import connected, details, refused
from tests.support.grpc_requests import BYTES_OF_A_REQUEST, asking

pytestmark = pytest.mark.anyio


async def test_a_bad_request_names_the_field(backend):
    async with connected(backend) as (_, channel):
        error = await refused(channel, asking("a", top_p=float("nan")))
    info, _ = details(error)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (info.domain, info.reason, info.metadata["param"]) == ("moejax", "InvalidRequest", "top_p")


async def test_a_request_without_prompt_is_refused(backend):
    async with connected(backend) as (_, channel):
        error = await refused(channel, inference_pb2.GenerateRequest())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Set text, token_ids or chat" in error.details()


async def test_a_full_queue_says_when_to_come_back():
    backend = FakeBackend(max_queue=0)
    async with connected(backend) as (_, channel):
        error = await refused(channel, asking())
    _, retry = details(error)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_a_defect_is_internal_and_does_not_show_its_text(backend):
    def broken() -> None:
        raise RuntimeError("a secret path")

    backend.status = broken
    async with connected(backend) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await resilience_pb2_grpc.ResilienceStub(channel).GetStatus(resilience_pb2.GetStatusRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()


async def test_an_error_on_the_way_ends_the_stream_with_its_status(backend):
    backend.fail_at = {2: Internal("broken")}
    async with connected(backend) as (_, channel):
        error = await refused(channel, asking())
    assert error.code() is grpc.StatusCode.INTERNAL


EXPECTED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}


UNREADABLE = grpc.StatusCode.INTERNAL


def test_any_bytes_end_in_an_answer_or_a_refusal():
    backend = FakeBackend()
    # One server for all examples: grpc.aio does not survive many event loops in one process.
    with serve_in_thread(backend) as server, grpc.insecure_channel(server.address) as channel:
        generate = channel.unary_stream("/moejax.v1.Inference/Generate")

        @given(request=BYTES_OF_A_REQUEST)
        @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
        def check(request: bytes) -> None:
            call = generate(request)
            with contextlib.suppress(grpc.RpcError):
                for _ in call:
                    pass
            readable = True
            try:
                inference_pb2.GenerateRequest.FromString(request)
            except Exception:
                readable = False
            assert call.code() in (EXPECTED if readable else EXPECTED | {UNREADABLE, grpc.StatusCode.UNKNOWN})

        check()
        assert backend.running == 0
