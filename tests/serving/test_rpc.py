"""The gRPC surface as clients of any language see it: raw channels, reflection, statuses, flow control."""

import asyncio
import contextlib
import dataclasses

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving import rpc
from serving.errors import Internal, StartError
from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc, resilience_pb2, resilience_pb2_grpc
from tests.fake_backend import MODEL, FakeBackend
from tests.fake_server import serve

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def connected(backend: FakeBackend):
    async with serve(backend) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield server, channel


async def until(condition, within_s: float = 10.0) -> None:
    """Wait for something that will happen soon."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


async def rest_of(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def details(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo]:
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(packed).details:
        detail.Unpack(info)
        detail.Unpack(retry)
    return info, retry


def asking(text: str = "a", **sampling) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text=text, sampling=inference_pb2.SamplingParams(**sampling))


async def refused(channel, request) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request):
            pass
    return caught.value


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


async def test_a_stream_has_tokens_text_logprobs_and_one_end(backend):
    async with connected(backend) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        answers = [a async for a in stub.Generate(asking("a", max_tokens=2, seed=5))]
    chunk, end = answers[1].chunk, answers[-1].complete
    assert (list(chunk.token_ids), chunk.text, list(chunk.logprobs)) == ([99], "c", [-0.5])
    assert (chunk.first_index, chunk.epoch) == (1, 0)
    assert end.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (end.seed, list(end.epochs)) == (5, [0])


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


async def test_the_deadline_of_the_call_is_the_requests(backend):
    backend.delay_s = 0.02
    async with connected(backend) as (_, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(asking(), timeout=0.2):
                pass
        await until(lambda: not backend.running)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
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
        before = -1
        while backend.status().tokens != before:  # until flow control holds it
            before = backend.status().tokens
            await asyncio.sleep(0.3)
        assert 0 < before < 10_000
        stub = inference_pb2_grpc.InferenceStub(channel)
        other = [a async for a in stub.Generate(asking("a", max_tokens=5))]
        assert other[-1].complete.usage.completion_tokens == 5
        idle.cancel()
        await until(lambda: not backend.running)
        await idle_channel.close()


async def test_a_message_that_is_too_large_is_refused(backend):
    async with connected(backend) as (_, channel):
        error = await refused(channel, asking("x" * (5 << 20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert backend.requests == []


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
        assert [await health(channel, name) for name in rpc.READINESS] == [not_serving] * 2
        assert [await health(channel, name) for name in rpc.LIVENESS] == [serving] * 3
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


async def test_watch_goes_on_after_the_last_known_event(backend):
    async with connected(backend) as (_, channel):
        for kind in ("ready", "lattice_ready"):
            await backend.happen(kind)
        watch = resilience_pb2_grpc.ResilienceStub(channel).Watch(resilience_pb2.WatchRequest(after=1))
        assert (await watch.read()).kind == "lattice_ready"
        await backend.lose(2)
        lost, recovered = await watch.read(), await watch.read()
    assert (lost.kind, lost.rank) == ("rank_lost", 2)
    assert [p.name for p in recovered.phases] == ["detect", "fence", "abort", "plan", "adopt", "resume"]


async def test_kill_needs_chaos(backend):
    backend.chaos = False
    async with connected(backend) as (_, channel):
        stub = resilience_pb2_grpc.ResilienceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Kill(resilience_pb2.KillRequest(rank=1))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        backend.chaos = True
        await stub.Kill(resilience_pb2.KillRequest(rank=1))
    assert backend.killed == [(1, "SIGKILL")]


async def test_a_server_that_stops_does_not_wait_for_watches(generation):
    server = await rpc.start(generation)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = resilience_pb2_grpc.ResilienceStub(channel).Watch(resilience_pb2.WatchRequest())
        reading = asyncio.ensure_future(watch.read())
        await asyncio.sleep(0.1)
        async with asyncio.timeout(20):
            await server.stop(60)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_taken_port_is_a_clear_error(generation):
    server = await rpc.start(generation)
    with pytest.raises(StartError, match=rf"gRPC cannot listen on 127\.0\.0\.1:{server.port}"):
        await rpc.start(generation, port=server.port)
    await server.stop()


BYTES_OF_A_REQUEST = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda text, t, k, n, seed, stop, ids: asking(
            text, temperature=t, top_k=k, max_tokens=n, seed=seed, stop=stop, stop_token_ids=ids
        ).SerializeToString(),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.floats(width=32),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(-(2**63), 2**63 - 1),
        st.lists(st.text("ab", max_size=3), max_size=3),
        st.lists(st.integers(0, 2**32 - 1), max_size=3),
    ),
)
EXPECTED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
UNREADABLE = grpc.StatusCode.INTERNAL


@given(requests=st.lists(BYTES_OF_A_REQUEST, min_size=20, max_size=20))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_end_in_an_answer_or_a_refusal(requests):
    async def run() -> None:
        backend = FakeBackend()
        async with connected(backend) as (_, channel):
            generate = channel.unary_stream("/moejax.v1.Inference/Generate")
            for request in requests:
                call = generate(request)
                code = await call.code()
                readable = True
                try:
                    inference_pb2.GenerateRequest.FromString(request)
                except Exception:
                    readable = False
                assert code in EXPECTED if readable else code in EXPECTED | {UNREADABLE, grpc.StatusCode.UNKNOWN}
            assert backend.running == 0

    asyncio.run(run())
