"""One port for the ranks of two pools: each is served by the executor that knows its token, and by no other."""

import asyncio
from typing import Any

import grpc
import pytest

from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import FailureDetectorSettings
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_listener import RankListener
from serving.launch.shared_listener import SharedListener
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.protocol.versions import LINK

pytestmark = pytest.mark.anyio


class Process:
    """A rank's process that does nothing; it proves who it is with `token`."""

    host_paths = None
    pid = 1

    def __init__(self, token: str) -> None:
        self.token = token

    def signal(self, name: str) -> None:
        pass

    def end(self) -> None:
        pass

    async def fenced(self) -> None:
        pass


class Starter:
    """Starts ranks with the tokens "rank N"; an earlier front has started `left`."""

    def __init__(self, *left: int) -> None:
        self._left = left

    def start(self, rank: int, front: str, on_exit: Any) -> Any:
        return Process(f"rank {rank}")

    def orphans(self) -> Any:
        return {rank: lambda _, rank=rank: Process(f"rank {rank}") for rank in self._left}


def executor(*left: int) -> RankExecutor:
    health = FailureDetectorSettings(heartbeat_floor_s=60, step_floor_s=60)
    return RankExecutor(health, lambda loss: None, Starter(*left))  # pyright: ignore[reportArgumentType]


async def attach(address: str, token: str, *, newest: int = LINK.newest) -> grpc.StatusCode | None:
    """Attach with a token until the front accepts it. Returns how it refuses."""
    channel = RankChannel(front=address, address="127.0.0.1").open_aio()
    call: Any = link_pb2_grpc.RankLinkStub(channel).Attach()
    hello = link_pb2.Hello(pid=1, token=token, oldest=LINK.oldest, newest=newest)
    await call.write(link_pb2.Report(hello=hello))
    try:
        async with asyncio.timeout(20):
            await call.initial_metadata()
            return await call.code() if call.done() else None
    finally:
        call.cancel()
        await channel.close()


async def test_each_rank_reaches_the_pool_that_knows_it_though_it_dials_before_that_pool_is_there() -> None:
    listener, first, second = SharedListener(RankListener(), pools=2), executor(), executor(1)
    await first.open(listener)
    first.spawn(0)
    early = asyncio.create_task(attach(first.address, "rank 1"))
    assert await attach(first.address, "rank 0") is None
    assert (await first.wait_attached(0)).token == "rank 0"
    assert not early.done()
    await second.open(listener)
    assert second.address == first.address
    second.adopt_left_ranks()
    assert await early is None
    assert (await second.wait_attached(1)).token == "rank 1"
    assert await attach(first.address, "rank 2") == grpc.StatusCode.UNAUTHENTICATED
    await second.close()
    first.spawn(3)
    assert await attach(first.address, "rank 3", newest=1) is None, "one pool that stops does not close the port"
    assert [first.link_version(ranks) for ranks in ([0], [3], [0, 3])] == [LINK.newest, 1, 1]
    await first.close()
