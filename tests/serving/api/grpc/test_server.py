"""The gRPC server itself: reflection, sizes, ports, and its end."""

import asyncio

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from serving.api.grpc.server import start_grpc
from serving.errors import StartError
from serving.proto.moejax.v1 import resilience_pb2, resilience_pb2_grpc
from tests.support.fake_server import serve
from tests.support.grpc_clients import connected, refused
from tests.support.grpc_requests import asking

pytestmark = pytest.mark.anyio


async def test_a_client_that_knows_only_reflection_can_generate(backend):
    async with serve(backend) as server:

        def call() -> list:
            with grpc.insecure_channel(server.address) as channel:
                pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
                method = pool.FindServiceByName("moejax.v1.Inference").FindMethodByName("Generate")
                ask, answer = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
                generate = channel.unary_stream(
                    "/moejax.v1.Inference/Generate", ask.SerializeToString, answer.FromString
                )
                return list(generate(ask(text="a", sampling={"max_tokens": 3})))

        answers = await asyncio.to_thread(call)
    assert "".join(a.chunk.text for a in answers) == "bcd"
    assert answers[-1].complete.usage.completion_tokens == 3


async def test_reflection_lists_every_service(backend):
    async with serve(backend) as server:

        def call() -> list:
            with grpc.insecure_channel(server.address) as channel:
                return list(ProtoReflectionDescriptorDatabase(channel).get_services())

        services = await asyncio.to_thread(call)
    assert {"moejax.v1.Inference", "moejax.v1.Resilience", "grpc.health.v1.Health"} <= set(services)


async def test_a_message_that_is_too_large_is_refused(backend):
    async with connected(backend) as (_, channel):
        error = await refused(channel, asking("x" * (5 << 20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert backend.requests == []


async def test_a_server_that_stops_does_not_wait_for_watches(processor):
    server = await start_grpc(processor)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = resilience_pb2_grpc.ResilienceStub(channel).Watch(resilience_pb2.WatchRequest())
        reading = asyncio.ensure_future(watch.read())
        # On the same connection, so that the server has the watch when this is answered.
        await resilience_pb2_grpc.ResilienceStub(channel).GetStatus(resilience_pb2.GetStatusRequest())
        async with asyncio.timeout(60):
            await server.stop(600)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_taken_port_is_a_clear_error(processor):
    server = await start_grpc(processor)
    with pytest.raises(StartError, match=rf"gRPC cannot listen on 127\.0\.0\.1:{server.port}"):
        await start_grpc(processor, port=server.port)
    await server.stop()
