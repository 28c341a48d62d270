"""The host pool behind the front's own port: which hosts are let in, and in which slots ranks are started."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import serving.launch.host_pool
from planner import Cluster, Workload, solve
from serving.auth.tls import ClientTls, ServerTls
from serving.errors import StartError
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause, FailureDetectorSettings
from serving.executor.incarnation import Loss
from serving.executor.rank_errors import RankLost
from serving.launch.host_pool import HostPool, with_current_hosts, with_rank_moved
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_listener import RankListener
from serving.launch.rank_process import HostPaths
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.version import build
from tests.support.joining import JOINED_MODEL, JoinFiles
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def join_files(tmp_path_factory: pytest.TempPathFactory) -> JoinFiles:
    return JoinFiles.made(tmp_path_factory.mktemp("join_files"), "127.0.0.1")


class Front:
    """The part of a front that starts ranks on joined hosts."""

    def __init__(self, join_files: JoinFiles, tls: ServerTls | None = None) -> None:
        order = link_pb2.PrepareModel(model="tiny", data_type="float32")
        self.losses: list[Loss] = []
        self.host_pool = HostPool(JOINED_MODEL, order, join_files.tokens.rejection)
        self.executor = RankExecutor(
            FailureDetectorSettings(heartbeat_floor_s=5, step_floor_s=5), self.losses.append, self.host_pool
        )
        self._listener = RankListener(tls=tls, host_pool=self.host_pool)

    async def __aenter__(self) -> "Front":
        await self.executor.open(self._listener)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.executor.close()


class ScriptedAgent:
    """A host agent that a test drives message by message."""

    def __init__(self, front: Front, tls: ClientTls | None = None) -> None:
        self._channel = RankChannel(front=front.executor.address, address="127.0.0.1", tls=tls).open_aio()
        self.stub = link_pb2_grpc.RankLinkStub(self._channel)
        self._call: Any = self.stub.Keep()

    async def __aenter__(self) -> "ScriptedAgent":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._call.cancel()
        await self._channel.close()

    async def report(self, **report: Any) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the front has ended it: `order` says why
            await self._call.write(link_pb2.PlaceReport(**report))

    async def order(self) -> link_pb2.PlaceOrder:
        try:
            async with asyncio.timeout(60):
                return await self._call.read()
        except grpc.RpcError:
            raise Refused(await self._call.code(), await self._call.details()) from None

    async def offer(self, secret: str, host: str, rack: str = "", **differently: Any) -> None:
        """Offer a slot and report the model as prepared; `differently` replaces fields of either message."""
        place = {"token": secret, "host": host, "rack": rack, "build": build(), "left": None}
        await self.report(place=link_pb2.Place(**place | {k: v for k, v in differently.items() if k in place}))
        order = await self.order()
        assert order.prepare.model == "tiny"
        prepared = {
            "config": JOINED_MODEL.config,
            "content": JOINED_MODEL.content,
            "numerics": JOINED_MODEL.numerics,
            "disk": host,
        }
        more = {k: v for k, v in differently.items() if k not in place}
        await self.report(prepared=link_pb2.ModelPrepared(**prepared | more))

    async def offer_and_wait(self, secret: str, **differently: Any) -> None:
        """Offer a slot, and wait for the front's next order. Raises Refused."""
        await self.offer(secret, "a", **differently)
        await self.order()


class Refused(Exception):
    """How the front ended the stream."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(f"{code.name}: {text}")


@contextlib.asynccontextmanager
async def offered_slots(front: Front, secret: str, *hosts: tuple[str, str]) -> AsyncIterator[list[ScriptedAgent]]:
    """Agents whose slots are free, by host and rack."""
    async with contextlib.AsyncExitStack() as stack:
        made = [await stack.enter_async_context(ScriptedAgent(front)) for _ in hosts]
        for each, (label, rack) in zip(made, hosts, strict=True):
            await each.offer(secret, label, rack)
        yield made


async def test_a_host_with_a_wrong_or_an_expired_token_learns_why_and_gets_nothing(join_files):
    async with Front(join_files) as front:
        for secret, why in (("mjr_wrong", "no join token"), (join_files.tokens.add("old", valid_s=-1), "expired")):
            async with ScriptedAgent(front) as host:
                with pytest.raises(Refused, match=f"UNAUTHENTICATED.*{why}"):
                    await host.offer(secret, "a")
        with pytest.raises(StartError, match="1 of 1 ranks are missing"):
            await front.host_pool.wait_for_slots(1, "here", 0.2, lambda _: None)
    join_files.tokens.remove("old")


@pytest.mark.parametrize(
    ("what", "value", "why"),
    [
        ("build", "0.0.1 (000)", "Install the same on every host"),
        ("content", "other weights", "configuration or the weights differ"),
        ("config", "{}", "configuration or the weights differ"),
        ("error", "no such model", "no such model"),
    ],
)
async def test_a_host_with_another_moejax_or_model_learns_what_differs(join_files, what, value, why):
    async with Front(join_files) as front, ScriptedAgent(front) as host:
        with pytest.raises(Refused, match=f"FAILED_PRECONDITION.*{why}"):
            await host.offer_and_wait(join_files.secret, **{what: value})


async def test_a_host_knows_nothing_of_the_context_that_the_front_serves(join_files):
    theirs = json.loads(JOINED_MODEL.config) | {"max_context": 131072}
    async with Front(join_files) as front, ScriptedAgent(front) as host:
        await host.offer(join_files.secret, "a", config=json.dumps(theirs))
        await front.host_pool.wait_for_slots(1, "here", 20, lambda _: None)


async def test_the_token_of_a_rank_is_valid_once(join_files):
    async with Front(join_files) as front, offered_slots(front, join_files.secret, ("a", "")) as (host,):
        front.executor.spawn(0)
        token = (await host.order()).start.token
        hello = link_pb2.Report(hello=link_pb2.Hello(token=token))
        first, again = host.stub.Attach(), host.stub.Attach()
        await first.write(hello)
        async with asyncio.timeout(60):
            await front.executor.wait_attached(0)
        stranger = host.stub.Attach()
        await again.write(hello)
        await stranger.write(link_pb2.Report(hello=link_pb2.Hello(token=join_files.secret)))
        async with asyncio.timeout(60):
            assert await again.code() == grpc.StatusCode.UNAUTHENTICATED
            assert await stranger.code() == grpc.StatusCode.UNAUTHENTICATED
        first.cancel()


async def test_the_fence_is_an_order_to_kill_and_a_stream_that_ends(join_files):
    async with Front(join_files) as front, offered_slots(front, join_files.secret, ("a", "")) as (host,):
        front.executor.spawn(0)
        start = (await host.order()).start
        stream = host.stub.Attach()
        await stream.write(link_pb2.Report(hello=link_pb2.Hello(token=start.token)))
        await front.executor.wait_attached(0)
        call = asyncio.create_task(front.executor.call(0, "join", link_pb2.Join()))
        await asyncio.sleep(0)
        front.executor.declare(0, Cause("heartbeat", "late"), 0.0)
        with pytest.raises(RankLost):
            await call
        order = (await host.order()).signal
        assert (order.incarnation, order.name) == (start.incarnation, "SIGKILL")
        assert await stream.read() != grpc.aio.EOF  # the join, sent before
        assert await stream.read() == grpc.aio.EOF
        async with asyncio.timeout(60):
            await front.executor.fenced(0)  # has an end though the host says nothing
        assert [loss.rank for loss in front.losses] == [0]


async def test_a_slot_is_used_again_once_its_rank_has_ended_and_not_before(join_files):
    async with Front(join_files) as front, offered_slots(front, join_files.secret, ("a", "")) as (host,):
        front.executor.spawn(0)
        first = (await host.order()).start
        front.executor.spawn(0)
        await host.report(ended=link_pb2.RankEnded(incarnation=first.incarnation, code=1, said="oh"))
        second = (await host.order()).start
        assert second.rank == 0
        assert (second.incarnation, second.token) != (first.incarnation, first.token)
        await host.report(ended=link_pb2.RankEnded(incarnation=first.incarnation, code=1, said="sent again"))
        await host.report(ended=link_pb2.RankEnded(incarnation=second.incarnation, code=1, said="oh"))
        await until(lambda: bool(front.losses))
        assert str(front.losses[0].cause) == "exited: process ended with code 1: on a: oh"


async def test_a_host_that_is_gone_takes_its_rank_along(join_files):
    async with Front(join_files) as front:
        async with offered_slots(front, join_files.secret, ("a", "")) as (host,):
            front.executor.spawn(0)
            await host.order()
        await until(lambda: bool(front.losses))
        assert front.losses[0].cause.detail == "the stream of a broke"


async def test_ranks_of_a_host_and_of_a_rack_have_numbers_that_follow_each_other(join_files):
    offered = (("b", "2"), ("a", "1"), ("c", "1"), ("b", "2"), ("a", "1"))
    async with Front(join_files) as front, offered_slots(front, join_files.secret, *offered):
        cluster = await front.host_pool.wait_for_slots(5, "here", 10, lambda _: None)
        assert [(d.host, d.rack) for d in cluster.devices] == [
            ("a", "1"),
            ("a", "1"),
            ("c", "1"),
            ("b", "2"),
            ("b", "2"),
        ]
        paths = [front.executor.spawn(rank).process.host_paths for rank in range(5)]
        assert [host_paths and host_paths.host for host_paths in paths] == ["a", "a", "c", "b", "b"]


async def test_a_rank_goes_back_to_its_host_before_it_takes_the_slot_of_another(join_files):
    async with (
        Front(join_files) as front,
        offered_slots(front, join_files.secret, ("a", ""), ("b", "")) as (first, _),
        ScriptedAgent(front) as spare,
        ScriptedAgent(front) as beside,
    ):
        await front.host_pool.wait_for_slots(2, "here", 10, lambda _: None)
        incarnation = front.executor.spawn(0)
        start = (await first.order()).start
        await spare.offer(join_files.secret, "c")
        await beside.offer(join_files.secret, "a")
        await until(lambda: len(front.host_pool.free) == 3)
        await first.report(ended=link_pb2.RankEnded(incarnation=start.incarnation, code=-9))
        await until(lambda: bool(front.losses))
        assert incarnation.process.host_paths is not None
        for _ in range(2):
            host_paths = front.executor.spawn(0).process.host_paths
            assert host_paths is not None
            assert host_paths.host == "a"
        host_paths = front.executor.spawn(0).process.host_paths
        assert host_paths is not None
        assert host_paths.host == "c", "the slot of another rank is the last to be taken"


def orphan(rank: int, incarnation: int = 0) -> link_pb2.LeftRank:
    """The orphan of a front that started it as its `incarnation`."""
    return link_pb2.LeftRank(incarnation=incarnation or 40 + rank, rank=rank, token=f"of rank {rank}", pid=7000 + rank)


async def test_the_next_front_takes_over_the_orphans_each_with_its_number(join_files):
    async with Front(join_files) as front, contextlib.AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(ScriptedAgent(front)) for _ in range(4)]
        early = hosts[0].stub.Attach()
        await early.write(link_pb2.Report(hello=link_pb2.Hello(token="of rank 2")))  # before the front knows of it
        gathering = asyncio.create_task(front.host_pool.wait_for_slots(3, "here", 10, lambda _: None))
        for each, host, rank in zip(hosts, "dcba", (None, 0, 2, 1), strict=True):
            await each.offer(join_files.secret, host, left=None if rank is None else orphan(rank))
        cluster = await gathering
        assert [(d.id, d.host) for d in cluster.devices] == [(0, "c"), (1, "a"), (2, "b")], "the spare came first"
        assert sorted(front.executor.adopt_left_ranks()) == [0, 1, 2]
        async with asyncio.timeout(60):
            await front.executor.wait_attached(2)
        for rank, each in ((0, hosts[1]), (1, hosts[3]), (2, hosts[2])):
            front.executor.declare(rank, Cause("heartbeat", "late"), 0.0)
            order = await each.order()
            assert (order.signal.incarnation, order.signal.name) == (40 + rank, "SIGKILL"), "and nothing was started"
        assert front.executor.spawn(0).process.host_paths.host == "d"
        assert (await hosts[0].order()).start.incarnation > 42
        early.cancel()


async def test_orphans_that_are_not_wanted_are_killed(join_files):
    async with Front(join_files) as front, contextlib.AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(ScriptedAgent(front)) for _ in range(4)]
        for each, rank, incarnation in zip(hosts, (0, 0, 5), (1, 2, 3), strict=False):
            await each.offer(join_files.secret, "a", left=orphan(rank, incarnation))
        await until(lambda: len(front.host_pool.free) == 3)
        await front.host_pool.wait_for_slots(1, "here", 10, lambda _: None)
        assert front.executor.adopt_left_ranks() == (0,)
        assert all(slot.orphan is None for slot in front.host_pool._slots.values())
        await hosts[3].offer(join_files.secret, "a", left=orphan(0, 4))
        ended = {(await each.order()).signal.incarnation for each in (hosts[2], hosts[3])}
        assert ended == {3, 4}, "of a number that is not served, and one that came too late"
        either = [asyncio.create_task(each.order()) for each in hosts[:2]]
        done, waiting = await asyncio.wait(either, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().signal.name for task in done] == ["SIGKILL"], "of two that are one rank"
        for task in waiting:
            task.cancel()


async def test_an_orphan_that_ends_while_the_front_waits_leaves_a_free_slot(join_files):
    async with Front(join_files) as front, ScriptedAgent(front) as host, ScriptedAgent(front) as other:
        await host.offer(join_files.secret, "a", left=orphan(1, 9))
        gathering = asyncio.create_task(front.host_pool.wait_for_slots(2, "here", 10, lambda _: None))
        await until(lambda: len(front.host_pool.free) == 1)
        await host.report(ended=link_pb2.RankEnded(incarnation=9, code=-9))
        await until(lambda: not front.host_pool._orphans())
        await other.offer(join_files.secret, "b")
        await gathering
        assert front.executor.adopt_left_ranks() == ()
        assert [front.executor.spawn(rank).process.host_paths.host for rank in (0, 1)] == ["a", "b"]
        assert (await host.order()).start.incarnation > 9


async def test_orphans_of_one_pool_keep_their_slots_until_that_pool_takes_them_over(join_files):
    async with Front(join_files) as front, contextlib.AsyncExitStack() as stack:
        for number in (0, 1):
            host = await stack.enter_async_context(ScriptedAgent(front))
            await host.offer(join_files.secret, f"h{number}", left=orphan(number, 9 + number))
        await until(lambda: len(front.host_pool.free) == 2)
        await front.host_pool.wait_for_slots(2, "here", 10, lambda _: None)
        assert front.host_pool.orphans([0]).keys() == {0}
        late = front.host_pool.start(0, "", lambda _: None)
        more = front.host_pool.start(0, "", lambda _: None)
        assert [each.host_paths for each in (late, more)] == [None, None], "both slots are taken"
        taken = front.host_pool.orphans([1])[1](lambda _: None)
        assert taken.host_paths is not None
        assert taken.host_paths.host == "h1"


async def test_spare_slots_replace_orphans_that_do_not_come(join_files, monkeypatch):
    monkeypatch.setattr(serving.launch.host_pool, "ORPHAN_WAIT_S", 0.1)
    async with (
        Front(join_files) as front,
        offered_slots(front, join_files.secret, ("b", ""), ("c", "")),
        ScriptedAgent(front) as host,
    ):
        await host.offer(join_files.secret, "a", left=orphan(1))
        await until(lambda: len(front.host_pool.free) == 3)
        cluster = await front.host_pool.wait_for_slots(2, "here", 10, lambda _: None)
        assert [d.host for d in cluster.devices] == ["b", "a"]
        assert front.executor.adopt_left_ranks() == (1,)


async def test_a_plan_made_before_a_rank_moved_gets_its_current_host():
    workload = Workload(moe_layers=1, experts=4, experts_per_token=1, expert_bytes=1)
    cluster = Cluster.local(3, hosts=["a", "a", "b"])
    plan = solve(workload, cluster)
    host_paths = HostPaths(host="c", rack="9", store="s", executables="e", disk="d")
    now = with_current_hosts(plan, with_rank_moved(cluster, 1, host_paths))
    assert [(r.id, r.host, r.rack) for r in now.ranks] == [(0, "a", ""), (1, "c", "9"), (2, "b", "")]
    assert with_current_hosts(now, cluster) == plan


@pytest.mark.parametrize("who", [None, "stranger", "host"])
async def test_with_mutual_tls_only_hosts_of_our_authority_can_say_anything(join_files, who):
    folder: Path = join_files.folder
    tls = ServerTls(cert=folder / "front.pem", key=folder / "front.key", client_ca=folder / "ca.pem")
    mine = ClientTls(ca=folder / "ca.pem") if who is None else None
    mine = mine or ClientTls(ca=folder / "ca.pem", cert=folder / f"{who}.pem", key=folder / f"{who}.key")
    async with Front(join_files, tls) as front, ScriptedAgent(front, mine) as host:
        if who == "host":
            await host.offer(join_files.secret, "a")
            return
        with pytest.raises(Refused, match="UNAVAILABLE"):
            await host.offer(join_files.secret, "a")


async def test_a_host_does_not_show_its_token_to_a_front_of_another_authority(join_files):
    folder: Path = join_files.folder
    tls = ServerTls(cert=folder / "front.pem", key=folder / "front.key")
    heard: list[str] = []
    async with Front(join_files, tls) as front:
        front.host_pool._token_check = lambda secret, now: heard.append(secret)
        for theirs in (ClientTls(ca=folder / "other-ca.pem"), None):
            async with ScriptedAgent(front, theirs) as host:
                with pytest.raises(Refused, match="UNAVAILABLE"):
                    await host.offer(join_files.secret, "a")
    assert heard == []
