"""A host agent's relay between two ranks and their front, over real streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from serving.engine.batch import Batch, ScheduledRequest, StepBucket
from serving.executor import host_relay
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import FailureDetectorSettings
from serving.executor.host_relay import HostRelay, relaying
from serving.executor.host_steps import host_results, host_step
from serving.executor.rank_errors import CommandFailed, NonFiniteStep, RankLost
from serving.launch.host_pool import HostPool
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_listener import RankListener
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.protocol.sampling import ResolvedSampling
from simulation.hand_model import small_limits
from tests.support.joining import JOINED_MODEL, free_address
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

SETTINGS = FailureDetectorSettings(heartbeat_floor_s=60, step_floor_s=60)
REFUSED = "this is no join token of this server"
BATCH = Batch(
    step=3,
    epoch=0,
    bucket=StepBucket(2, 0),
    scheduled={
        rank: (ScheduledRequest(f"r{rank}", 4, (7,), (0, 1), True, ResolvedSampling(max_tokens=9, seed=1)),)
        for rank in (0, 1)
    },
)


class Process:
    """The process of a rank that the test plays."""

    host_paths, pid, state, exit_code = None, None, "S", None

    def __init__(self, rank: int) -> None:
        self.token = f"token-{rank}"
        self.ended = False

    def signal(self, name: str) -> None:
        self.ended = True

    async def fenced(self) -> None:
        pass

    def run_delay_s(self) -> float | None:
        return None

    def last_output(self) -> str:
        return ""

    def end(self) -> None:
        self.ended = True


class Starter:
    """Ranks that the test plays are there already."""

    def start(self, rank: int, front: str, on_exit: Any) -> Any:
        return Process(rank)

    def orphans(self) -> dict[int, Any]:
        return {}


@contextlib.asynccontextmanager
async def front_at(address: str, *, expects: int = 2) -> AsyncIterator[RankExecutor]:
    """A front with so many ranks, whose hosts need the join token "secret"."""
    pool = HostPool(JOINED_MODEL, link_pb2.PrepareModel(), lambda secret, now: None if secret == "secret" else REFUSED)
    executor = RankExecutor(SETTINGS, lambda loss: None, Starter())
    for rank in range(expects):
        executor.spawn(rank)
    await executor.open(RankListener(address=address, host_pool=pool, heartbeat_s=0.02))
    try:
        yield executor
    finally:
        await executor.close()


class Rank:
    """A rank as the relay sees it: what it gets, and a way to report."""

    def __init__(self, address: str, number: int) -> None:
        self.number = number
        self.got: list[link_pb2.Command] = []
        self.code: grpc.StatusCode | None = None
        self._reports: asyncio.Queue[link_pb2.Report | None] = asyncio.Queue()
        self.report(hello=link_pb2.Hello(token=f"token-{number}", oldest=1, newest=1))
        self.running = asyncio.create_task(self._run(address))

    def report(self, **what: Any) -> None:
        self._reports.put_nowait(link_pb2.Report(rank=self.number, **what))

    async def next(self, what: str) -> Any:
        await until(lambda: bool(self.got))
        command = self.got.pop(0)
        assert command.WhichOneof("what") == what
        return command

    async def _run(self, address: str) -> None:
        async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
            try:
                async for command in link_pb2_grpc.RankLinkStub(channel).Attach(self._outgoing()):
                    self.got.append(command)
                self.code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                self.code = error.code()

    async def _outgoing(self) -> AsyncIterator[link_pb2.Report]:
        while (report := await self._reports.get()) is not None:
            yield report


@contextlib.asynccontextmanager
async def relay_to(front: str, folder: Path, secret: str = "secret") -> AsyncIterator[tuple[HostRelay, list[str]]]:
    logged: list[str] = []
    relay = HostRelay(RankChannel(front=front, address="127.0.0.1"), folder, secret=secret, host="a", log=logged.append)
    for rank in (0, 1):
        relay.expect(f"token-{rank}")
    async with relaying(relay):
        await until(lambda: (folder / "ranks").exists())
        yield relay, logged


@contextlib.asynccontextmanager
async def ranks_of(relay: HostRelay) -> AsyncIterator[list[Rank]]:
    ranks = [Rank(relay.address, number) for number in (0, 1)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.running.cancel()
        await asyncio.gather(*(rank.running for rank in ranks), return_exceptions=True)


def send(executor: RankExecutor, batch: Batch = BATCH) -> "asyncio.Task[Any]":
    """Send a step to both ranks, as one message."""
    own, hosts = executor.by_host((0, 1))
    assert not own
    assert list(hosts.values()) == [[0, 1]]
    parts = {
        stream: (ranks, host_step(batch, ranks, epoch=0, bucket=0, limits=small_limits(), masks=lambda params: None))  # type: ignore[arg-type,return-value]
        for stream, ranks in hosts.items()
    }
    return asyncio.create_task(executor.step({}, parts))


def done(token: int) -> link_pb2.StepDone:
    tokens, logprobs = token.to_bytes(4, "little") * 2, bytes(8)
    load = link_pb2.StepDone(step=3, tokens=tokens, logprobs=logprobs, expert_load=token.to_bytes(4, "little"))
    return load


async def test_a_step_reaches_every_rank_of_the_host_and_their_answers_are_one(tmp_path: Path) -> None:
    address, loads = free_address(), list[bytes]()
    async with front_at(address) as executor, relay_to(address, tmp_path) as (relay, _), ranks_of(relay) as ranks:
        executor._hosts._on_expert_load = loads.append
        hellos = [await executor.wait_attached(rank) for rank in (0, 1)]
        assert [hello.token for hello in hellos] == ["token-0", "token-1"]
        called = asyncio.create_task(executor.call_all("ping", dict.fromkeys((0, 1), link_pb2.Ping())))
        for rank in ranks:
            rank.report(done=link_pb2.Done(id=(await rank.next("ping")).id))
        await called
        sent = send(executor)
        parts = [(await rank.next("step")).step for rank in ranks]
        assert all(part.step == 3 and part.inputs for part in parts)
        for rank in ranks:
            rank.report(step_done=done(40 + rank.number))
        answers = await sent
        assert [sorted(answer.ranks) for answer in answers.hosts] == [[0, 1]], "sent once both are there"
        results = host_results(BATCH, answers.hosts[0])
        assert {name: result.token for name, result in results.items()} == {"r0": 40, "r1": 41}
        await until(lambda: sum(int.from_bytes(load, "little") for load in loads) == 40 + 41)
        before = [executor.get(rank).last_heartbeat for rank in (0, 1)]  # type: ignore[union-attr]
        for rank in ranks:
            rank.report(heartbeat=link_pb2.Heartbeat())
        await until(lambda: all(executor.get(rank).last_heartbeat > before[rank] for rank in (0, 1)))  # type: ignore[union-attr]
        executor.abort((0, 1), 9)
        assert [(await rank.next("abort")).abort.epoch for rank in ranks] == [9, 9]


async def test_a_rank_that_fails_or_dies_fails_the_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_relay, "COLLECT_S", 0.02)
    address = free_address()
    async with front_at(address) as executor, relay_to(address, tmp_path) as (relay, _), ranks_of(relay) as ranks:
        await asyncio.gather(*(executor.wait_attached(rank) for rank in (0, 1)))
        sent = send(executor)
        ranks[0].report(step_failed=link_pb2.StepFailed(step=3, error="reset", exchange=True))
        with pytest.raises(CommandFailed, match="reset"):
            await sent
        sent = send(executor)
        for rank in ranks:
            rank.report(step_failed=link_pb2.StepFailed(step=3, error="nan", non_finite_rows=[rank.number]))
        with pytest.raises(NonFiniteStep) as non_finite:
            await sent
        assert non_finite.value.rows == {0: (0,), 1: (1,)}
        sent = send(executor)
        ranks[0].report(step_done=done(1))
        first = executor.get(0)
        assert first is not None
        await until(lambda: not first.pending_steps)  # an answer does not wait for a rank that gives none
        for rank in (0, 1):
            executor.monitor(rank)
        ranks[1].running.cancel()
        with pytest.raises(RankLost, match="rank 1 is lost: stream"):
            await sent
        assert first.loss is None


async def test_ranks_of_a_lost_front_are_passed_on_to_the_next_one(tmp_path: Path) -> None:
    address = free_address()
    async with relay_to(address, tmp_path) as (relay, _):
        for _ in range(2):
            async with ranks_of(relay) as ranks:
                async with front_at(address) as executor:
                    await asyncio.gather(*(executor.wait_attached(rank) for rank in (0, 1)))
                await asyncio.gather(*(rank.running for rank in ranks))
                assert [rank.code for rank in ranks] == [grpc.StatusCode.OK] * 2


async def test_who_has_no_token_is_refused_by_the_front_or_the_agent(tmp_path: Path) -> None:
    address = free_address()
    async with front_at(address, expects=1), relay_to(address, tmp_path) as (relay, _):
        stranger, unknown = Rank(relay.address, 5), Rank(relay.address, 1)
        await asyncio.gather(stranger.running, unknown.running)
        assert stranger.code == unknown.code == grpc.StatusCode.UNAUTHENTICATED
    async with front_at(address), relay_to(address, tmp_path, secret="wrong") as (_, logged):
        await until(lambda: any(REFUSED in line for line in logged))


async def test_an_agent_of_another_version_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_relay, "HOST", host_relay.HOST.__class__(7, 8))
    address = free_address()
    async with front_at(address), relay_to(address, tmp_path) as (_, logged):
        await until(lambda: any("version 7 to 8" in line and "the front version 1" in line for line in logged))
