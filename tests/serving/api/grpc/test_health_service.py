"""Health as probes and gateways ask for it: liveness stays, readiness goes with the last rank."""

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.api.grpc.health_service import LIVENESS, READINESS
from tests.support.grpc_clients import connected

pytestmark = pytest.mark.anyio


async def health(channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_liveness_stays_and_readiness_goes_with_the_last_rank(backend):
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with connected(backend) as (_, channel):
        for rank in range(3):
            await backend.lose(rank)
        assert await health(channel, "readiness") == serving
        await backend.lose(3)
        assert [await health(channel, name) for name in READINESS] == [not_serving] * 2
        assert [await health(channel, name) for name in LIVENESS] == [serving] * 3
        await backend.rejoin(0)
        assert await health(channel, "moejax.v1.Inference") == serving


async def test_an_unknown_health_service_is_not_found(backend):
    async with connected(backend) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel, "nope")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_can_be_watched(backend):
    async with connected(backend) as (_, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        backend.draining = True
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
