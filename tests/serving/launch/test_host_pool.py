"""Who is let in to be a rank, and where ranks are started: the front's own port, and hosts that speak to it by hand."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import serving.places
from planner import Cluster, Workload, solve
from serving.dial import Way
from serving.errors import StartError
from serving.health import Cause, HealthSettings
from serving.links import Loss, RankLinks, RankLost
from serving.places import Places, at_home, placed
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.rank_listener import RankListener
from serving.rank_process import Home
from serving.tls import ClientTls, ServerTls
from serving.version import build
from tests.e2e.joining import Papers
from tests.serving.test_recovery_machine import MODEL

pytestmark = pytest.mark.anyio

OURS = dataclasses.replace(MODEL, config="ours", content="0123", numerics="4567")


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers.made(tmp_path_factory.mktemp("papers"), "127.0.0.1")


class Front:
    """What a front has of the links to its ranks."""

    def __init__(self, papers: Papers, tls: ServerTls | None = None) -> None:
        order = link_pb2.PrepareModel(model="tiny", data_type="float32")
        self.losses: list[Loss] = []
        self.places = Places(OURS, order, papers.tokens.why_not)
        self.links = RankLinks(HealthSettings(heartbeat_floor_s=5, step_floor_s=5), self.losses.append, self.places)
        self._listener = RankListener(tls=tls, places=self.places)

    async def __aenter__(self) -> "Front":
        await self.links.open(self._listener)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.links.close()


class Host:
    """A host's side of keeping a place, said word by word."""

    def __init__(self, front: Front, tls: ClientTls | None = None) -> None:
        self._channel = Way(front=front.links.address, address="127.0.0.1", tls=tls).aio_channel()
        self.stub = link_pb2_grpc.RankLinkStub(self._channel)
        self._call: Any = self.stub.Keep()

    async def __aenter__(self) -> "Host":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._call.cancel()
        await self._channel.close()

    async def say(self, **report: Any) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the front has ended it: `order` says why
            await self._call.write(link_pb2.PlaceReport(**report))

    async def order(self) -> link_pb2.PlaceOrder:
        try:
            async with asyncio.timeout(10):
                return await self._call.read()
        except grpc.RpcError:
            raise Refused(await self._call.code(), await self._call.details()) from None

    async def offers(self, secret: str, host: str, rack: str = "", **differently: Any) -> None:
        """From the first word to a place that is free."""
        told = {"token": secret, "host": host, "rack": rack, "build": build(), "left": None}
        await self.say(place=link_pb2.Place(**told | {k: v for k, v in differently.items() if k in told}))
        order = await self.order()
        assert order.prepare.model == "tiny"
        prepared = {"config": OURS.config, "content": OURS.content, "numerics": OURS.numerics, "disk": host}
        more = {k: v for k, v in differently.items() if k not in told}
        await self.say(prepared=link_pb2.ModelPrepared(**prepared | more))

    async def tries(self, secret: str, **differently: Any) -> None:
        """Offer a place, and wait for what comes of it."""
        await self.offers(secret, "a", **differently)
        await self.order()


class Refused(Exception):
    """How the front ended the stream."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(f"{code.name}: {text}")


@contextlib.asynccontextmanager
async def places(front: Front, secret: str, *hosts: tuple[str, str]) -> AsyncIterator[list[Host]]:
    """Hosts whose places are free, by label and rack."""
    async with contextlib.AsyncExitStack() as stack:
        made = [await stack.enter_async_context(Host(front)) for _ in hosts]
        for each, (label, rack) in zip(made, hosts, strict=True):
            await each.offers(secret, label, rack)
        yield made


async def until(holds: Callable[[], bool]) -> None:
    """Wait until `holds`."""
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


def secret_of(papers: Papers) -> str:
    return (papers.folder / "token").read_text().strip()


async def test_a_host_with_a_wrong_or_an_expired_token_is_told_so_and_gets_nothing(papers):
    async with Front(papers) as front:
        for secret, why in (("mjr_wrong", "no join token"), (papers.tokens.add("old", valid_s=-1), "expired")):
            async with Host(front) as host:
                with pytest.raises(Refused, match=f"UNAUTHENTICATED.*{why}"):
                    await host.offers(secret, "a")
        with pytest.raises(StartError, match="1 of 1 ranks are missing"):
            await front.places.gather(1, "here", 0.2, lambda _: None)
    papers.tokens.remove("old")


@pytest.mark.parametrize(
    ("what", "value", "why"),
    [
        ("build", "0.0.1 (000)", "Install the same on every host"),
        ("content", "other weights", "configuration or the weights differ"),
        ("config", "{}", "configuration or the weights differ"),
        ("error", "no such model", "no such model"),
    ],
)
async def test_a_host_with_another_moejax_or_model_is_told_what_differs(papers, what, value, why):
    async with Front(papers) as front, Host(front) as host:
        with pytest.raises(Refused, match=f"FAILED_PRECONDITION.*{why}"):
            await host.tries(secret_of(papers), **{what: value})


async def test_what_a_rank_proves_itself_with_counts_once(papers):
    async with Front(papers) as front, places(front, secret_of(papers), ("a", "")) as (host,):
        front.links.spawn(0)
        token = (await host.order()).start.token
        hello = link_pb2.Report(hello=link_pb2.Hello(token=token))
        first, again = host.stub.Attach(), host.stub.Attach()
        await first.write(hello)
        async with asyncio.timeout(10):
            await front.links.attached(0)
        stranger = host.stub.Attach()
        await again.write(hello)
        await stranger.write(link_pb2.Report(hello=link_pb2.Hello(token=secret_of(papers))))
        async with asyncio.timeout(10):
            assert await again.code() == grpc.StatusCode.UNAUTHENTICATED
            assert await stranger.code() == grpc.StatusCode.UNAUTHENTICATED
        first.cancel()


async def test_the_fence_is_an_order_to_kill_and_a_stream_that_ends(papers):
    async with Front(papers) as front, places(front, secret_of(papers), ("a", "")) as (host,):
        front.links.spawn(0)
        start = (await host.order()).start
        stream = host.stub.Attach()
        await stream.write(link_pb2.Report(hello=link_pb2.Hello(token=start.token)))
        await front.links.attached(0)
        call = asyncio.create_task(front.links.call(0, "join", link_pb2.Join()))
        await asyncio.sleep(0)
        front.links.declare(0, Cause("heartbeat", "late"), 0.0)
        with pytest.raises(RankLost):
            await call
        order = (await host.order()).signal
        assert (order.incarnation, order.name) == (start.incarnation, "SIGKILL")
        assert await stream.read() != grpc.aio.EOF  # the join, sent before
        assert await stream.read() == grpc.aio.EOF
        async with asyncio.timeout(10):
            await front.links.fenced(0)  # has an end though the host says nothing
        assert [loss.rank for loss in front.losses] == [0]


async def test_a_place_is_used_again_once_its_rank_has_ended_and_not_before(papers):
    async with Front(papers) as front, places(front, secret_of(papers), ("a", "")) as (host,):
        front.links.spawn(0)
        first = (await host.order()).start
        front.links.spawn(0)
        await host.say(ended=link_pb2.RankEnded(incarnation=first.incarnation, code=1, said="oh"))
        second = (await host.order()).start
        assert second.rank == 0
        assert (second.incarnation, second.token) != (first.incarnation, first.token)
        await host.say(ended=link_pb2.RankEnded(incarnation=first.incarnation, code=1, said="told again"))
        await host.say(ended=link_pb2.RankEnded(incarnation=second.incarnation, code=1, said="oh"))
        await until(lambda: bool(front.losses))
        assert str(front.losses[0].cause) == "exited: process ended with code 1: on a: oh"


async def test_a_host_that_is_gone_takes_its_rank_along(papers):
    async with Front(papers) as front:
        async with places(front, secret_of(papers), ("a", "")) as (host,):
            front.links.spawn(0)
            await host.order()
        await until(lambda: bool(front.losses))
        assert front.losses[0].cause.detail == "the stream of a broke"


async def test_ranks_of_a_host_and_of_a_rack_have_numbers_that_follow_each_other(papers):
    offered = (("b", "2"), ("a", "1"), ("c", "1"), ("b", "2"), ("a", "1"))
    async with Front(papers) as front, places(front, secret_of(papers), *offered):
        cluster = await front.places.gather(5, "here", 10, lambda _: None)
        assert [(d.host, d.rack) for d in cluster.devices] == [
            ("a", "1"),
            ("a", "1"),
            ("c", "1"),
            ("b", "2"),
            ("b", "2"),
        ]
        homes = [front.links.spawn(rank).process.home for rank in range(5)]
        assert [home and home.host for home in homes] == ["a", "a", "c", "b", "b"]


async def test_a_rank_goes_back_to_its_host_before_it_takes_anothers_place(papers):
    async with (
        Front(papers) as front,
        places(front, secret_of(papers), ("a", ""), ("b", "")) as (first, _),
        Host(front) as spare,
        Host(front) as beside,
    ):
        await front.places.gather(2, "here", 10, lambda _: None)
        incarnation = front.links.spawn(0)
        start = (await first.order()).start
        await spare.offers(secret_of(papers), "c")
        await beside.offers(secret_of(papers), "a")
        await until(lambda: len(front.places.free) == 3)
        await first.say(ended=link_pb2.RankEnded(incarnation=start.incarnation, code=-9))
        await until(lambda: bool(front.losses))
        assert incarnation.process.home is not None
        for _ in range(2):
            home = front.links.spawn(0).process.home
            assert home is not None
            assert home.host == "a"
        home = front.links.spawn(0).process.home
        assert home is not None
        assert home.host == "c", "the place of another rank is the last to be taken"


def left_rank(rank: int, incarnation: int = 0) -> link_pb2.LeftRank:
    """A rank that a front has left, which started it as its `incarnation`."""
    return link_pb2.LeftRank(incarnation=incarnation or 40 + rank, rank=rank, token=f"of rank {rank}", pid=7000 + rank)


async def test_the_next_front_goes_on_with_the_ranks_that_were_left_each_with_its_number(papers):
    async with Front(papers) as front, contextlib.AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(Host(front)) for _ in range(4)]
        early = hosts[0].stub.Attach()
        await early.write(link_pb2.Report(hello=link_pb2.Hello(token="of rank 2")))  # before the front knows of it
        gathering = asyncio.create_task(front.places.gather(3, "here", 10, lambda _: None))
        for each, host, rank in zip(hosts, "dcba", (None, 0, 2, 1), strict=True):
            await each.offers(secret_of(papers), host, left=None if rank is None else left_rank(rank))
        cluster = await gathering
        assert [(d.id, d.host) for d in cluster.devices] == [(0, "c"), (1, "a"), (2, "b")], "the spare came first"
        assert sorted(front.links.inherit()) == [0, 1, 2]
        async with asyncio.timeout(10):
            await front.links.attached(2)
        for rank, each in ((0, hosts[1]), (1, hosts[3]), (2, hosts[2])):
            front.links.declare(rank, Cause("heartbeat", "late"), 0.0)
            order = await each.order()
            assert (order.signal.incarnation, order.signal.name) == (40 + rank, "SIGKILL"), "and nothing was started"
        assert front.links.spawn(0).process.home.host == "d"
        assert (await hosts[0].order()).start.incarnation > 42
        early.cancel()


async def test_ranks_that_were_left_and_are_not_wanted_are_ended(papers):
    async with Front(papers) as front, contextlib.AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(Host(front)) for _ in range(4)]
        for each, rank, incarnation in zip(hosts, (0, 0, 5), (1, 2, 3), strict=False):
            await each.offers(secret_of(papers), "a", left=left_rank(rank, incarnation))
        await until(lambda: len(front.places.free) == 3)
        await front.places.gather(1, "here", 10, lambda _: None)
        assert front.links.inherit() == (0,)
        kept = {front.places._places[number].left is None for number in front.places._places}
        assert kept == {True}
        await hosts[3].offers(secret_of(papers), "a", left=left_rank(0, 4))
        ended = {(await each.order()).signal.incarnation for each in (hosts[2], hosts[3])}
        assert ended == {3, 4}, "of a number that is not served, and one that came too late"
        either = [asyncio.create_task(each.order()) for each in hosts[:2]]
        done, waiting = await asyncio.wait(either, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().signal.name for task in done] == ["SIGKILL"], "of two that are one rank"
        for task in waiting:
            task.cancel()


async def test_a_left_rank_that_ends_while_others_are_waited_for_is_a_free_place(papers):
    async with Front(papers) as front, Host(front) as host, Host(front) as other:
        await host.offers(secret_of(papers), "a", left=left_rank(1, 9))
        gathering = asyncio.create_task(front.places.gather(2, "here", 10, lambda _: None))
        await until(lambda: len(front.places.free) == 1)
        await host.say(ended=link_pb2.RankEnded(incarnation=9, code=-9))
        await until(lambda: not front.places._left())
        await other.offers(secret_of(papers), "b")
        await gathering
        assert front.links.inherit() == ()
        assert [front.links.spawn(rank).process.home.host for rank in (0, 1)] == ["a", "b"]
        assert (await host.order()).start.incarnation > 9


async def test_spares_take_the_places_of_ranks_that_were_left_and_do_not_come(papers, monkeypatch):
    monkeypatch.setattr(serving.places, "SPARE_S", 0.1)
    async with Front(papers) as front, places(front, secret_of(papers), ("b", ""), ("c", "")), Host(front) as host:
        await host.offers(secret_of(papers), "a", left=left_rank(1))
        await until(lambda: len(front.places.free) == 3)
        cluster = await front.places.gather(2, "here", 10, lambda _: None)
        assert [d.host for d in cluster.devices] == ["b", "a"]
        assert front.links.inherit() == (1,)


async def test_a_plan_made_before_a_rank_moved_says_where_it_is_now():
    workload = Workload(moe_layers=1, experts=4, experts_per_token=1, expert_bytes=1)
    cluster = Cluster.local(3, hosts=["a", "a", "b"])
    plan = solve(workload, cluster)
    home = Home(host="c", rack="9", store="s", executables="e", disk="d")
    now = placed(plan, at_home(cluster, 1, home))
    assert [(r.id, r.host, r.rack) for r in now.ranks] == [(0, "a", ""), (1, "c", "9"), (2, "b", "")]
    assert placed(now, cluster) == plan


@pytest.mark.parametrize("who", [None, "stranger", "host"])
async def test_with_mutual_tls_only_hosts_of_our_authority_can_say_anything(papers, who):
    folder: Path = papers.folder
    tls = ServerTls(cert=folder / "front.pem", key=folder / "front.key", client_ca=folder / "ca.pem")
    mine = ClientTls(ca=folder / "ca.pem") if who is None else None
    mine = mine or ClientTls(ca=folder / "ca.pem", cert=folder / f"{who}.pem", key=folder / f"{who}.key")
    async with Front(papers, tls) as front, Host(front, mine) as host:
        if who == "host":
            await host.offers(secret_of(papers), "a")
            return
        with pytest.raises(Refused, match="UNAVAILABLE"):
            await host.offers(secret_of(papers), "a")


async def test_a_host_does_not_show_its_token_to_a_front_of_another_authority(papers):
    folder: Path = papers.folder
    tls = ServerTls(cert=folder / "front.pem", key=folder / "front.key")
    heard: list[str] = []
    async with Front(papers, tls) as front:
        front.places._why_not = lambda secret, now: heard.append(secret)
        for theirs in (ClientTls(ca=folder / "other-ca.pem"), None):
            async with Host(front, theirs) as host:
                with pytest.raises(Refused, match="UNAVAILABLE"):
                    await host.offers(secret_of(papers), "a")
    assert heard == []
