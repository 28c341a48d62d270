"""Events can be watched from where a client left off, and ranks are killed only where faults are allowed."""

import grpc
import grpc.aio
import pytest

from serving.proto.moejax.v1 import resilience_pb2, resilience_pb2_grpc
from tests.support.grpc_clients import connected

pytestmark = pytest.mark.anyio


async def test_watch_goes_on_after_the_last_known_event(backend):
    async with connected(backend) as (_, channel):
        for kind in ("ready", "lattice_ready"):
            await backend.emit(kind)
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
