"""A host agent's rank survives the front: the next front takes it over, and without one the agent kills it."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import serving.launch.host_agent
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import FailureDetectorSettings
from serving.launch.forkserver import Forkserver
from serving.launch.host_agent import HostAgent, SlotOffer, prepared_message
from serving.launch.host_pool import HostPool
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_listener import RankListener
from serving.launch.rank_process import RANK_PROGRAM
from serving.launch.run_delay import run_delay_s
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.prepared_model import PreparedModel
from tests.support.joining import JOINED_MODEL, free_address
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


ORDER = link_pb2.PrepareModel(
    model="tiny", data_type="int8", in_place=True, dense="sharded", mtp=True, kv_cache_type="bfloat16"
)


class Front:
    """A front at an address, whose hosts need no token. It ends as if it had died: it sends nothing to them."""

    def __init__(self, address: str, heartbeat_s: float = 0.05) -> None:
        self.host_pool = HostPool(JOINED_MODEL, ORDER, lambda secret, now: None)
        self.executor = RankExecutor(
            FailureDetectorSettings(heartbeat_floor_s=60, step_floor_s=60), lambda loss: None, self.host_pool
        )
        self._listener = RankListener(address=address, host_pool=self.host_pool, heartbeat_s=heartbeat_s)

    async def __aenter__(self) -> "Front":
        await self.executor.open(self._listener)
        await self.host_pool.wait_for_slots(1, "here", 20, lambda _: None)
        self.inherited = self.executor.adopt_left_ranks()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self.executor._server is not None
        assert self.executor._monitoring is not None
        self.executor._monitoring.cancel()
        await self.executor._server.stop(0)

    async def pid(self) -> int:
        """The pid of rank 0, once its agent has reported it."""
        await until(lambda: (each := self.executor.get(0)) is not None and each.process.pid is not None)
        each = self.executor.get(0)
        assert each is not None
        assert each.process.pid is not None
        return each.process.pid


@pytest.fixture
def orphan_timeout_s() -> float:
    """Longer than a front takes to come."""
    return 60.0


@pytest.fixture
async def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orphan_timeout_s: float) -> AsyncIterator[str]:
    """The address of the front of an agent whose host has prepared the model already."""

    async def prepare(model: str, weights: str, **how: object) -> PreparedModel:
        asked = {field.name: value for field, value in ORDER.ListFields()}
        assert {"model": model, "data_type": weights} | how == asked, "all that the front orders is obeyed"
        return dataclasses.replace(JOINED_MODEL, executables=str(tmp_path / "executables"))

    monkeypatch.setattr(serving.launch.host_agent, "prepare_model", prepare)
    monkeypatch.setattr(serving.launch.host_agent, "REDIAL_S", 0.05)
    front = free_address()
    offer = SlotOffer(secret="", host="a", orphan_timeout_s=orphan_timeout_s)
    forkserver = Forkserver(RANK_PROGRAM)
    agent = HostAgent(RankChannel(front=front, address="127.0.0.1"), offer, forkserver, lambda text: None)
    running = asyncio.create_task(agent.run())
    yield front
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert agent._running is None
    forkserver.end()


def is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


async def test_the_next_front_takes_over_the_rank_that_runs_here(address):
    async with Front(address) as front:
        assert front.inherited == ()
        front.executor.spawn(0)
        pid = await front.pid()
    for _ in range(2):
        async with Front(address) as front:
            assert front.inherited == (0,)
            assert await front.pid() == pid
    async with Front(address) as front:
        await front.executor.close()
        assert not is_there(pid), "a front that ends in order ends its ranks"


@pytest.mark.parametrize("orphan_timeout_s", [2.0])
async def test_a_rank_is_killed_when_no_front_comes(address):
    async with Front(address) as front:
        front.executor.spawn(0)
        pid = await front.pid()
    await until(lambda: not is_there(pid))
    async with Front(address) as front:
        assert front.inherited == ()


async def test_a_rank_that_ended_while_no_front_was_there_is_not_offered(address):
    async with Front(address) as front:
        front.executor.spawn(0)
        pid = await front.pid()
    os.kill(pid, 9)
    await until(lambda: not is_there(pid))
    async with Front(address) as front:
        assert front.inherited == ()
        (slot,) = front.host_pool.free
        process = front.executor.spawn(0).process
        await front.pid()
        slot.orders.put_nowait(link_pb2.PlaceOrder(signal=link_pb2.SignalRank(incarnation=10**6, name="SIGKILL")))
        process.incarnation = 10**6
        await until(lambda: slot.rank is None)  # the agent reported the end of the rank that it was to kill


async def test_the_front_is_told_how_the_kernel_sees_a_rank_on_a_joined_host(address):
    for _ in range(2):  # the next front too
        async with Front(address) as front:
            process = (front.executor.get(0) or front.executor.spawn(0)).process
            pid = await front.pid()
            await until(lambda process=process: process.state in ("R", "S", "D"))
            assert (process.run_delay_s() is None) == (run_delay_s(pid) is None)
            os.kill(pid, signal.SIGSTOP)
            await until(lambda process=process: process.state == "T")
            os.kill(pid, signal.SIGCONT)
            await until(lambda process=process: process.state in ("R", "S", "D"))


async def test_a_rank_on_a_joined_host_sends_heartbeats_no_more_often_than_each_front_wants(address):
    for interval_s in (0.1, 0.3):
        async with Front(address, interval_s) as front:
            incarnation = front.executor.get(0) or front.executor.spawn(0)
            await front.executor.wait_attached(0)
            front.executor.monitor(0)
            began = time.monotonic()
            await until(lambda incarnation=incarnation: len(incarnation.heartbeat_gaps) >= 6)
            assert time.monotonic() - began >= 3 * interval_s  # of the first ones some were on their way before


def test_slots_of_one_folder_share_programs_only_where_these_have_the_same_names(tmp_path, monkeypatch):
    model = dataclasses.replace(JOINED_MODEL, executables=str(tmp_path))
    narrow, also_narrow, wide = (prepared_message(model, threads).disk for threads in (1, 1, 2))
    assert narrow == also_narrow != wide
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert prepared_message(model, 1).disk != narrow
