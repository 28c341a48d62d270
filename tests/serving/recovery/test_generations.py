"""Losses while a generation is opened, and while a plan is adopted."""

import asyncio

import pytest

import serving.recovery.rendezvous
from serving.config import Settings
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause, FailureDetectorSettings
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.instructions import Instruction
from tests.support.fake_executor import FakeCoordinator, FakeExecutor
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine

pytestmark = pytest.mark.usefixtures("no_processes")


@pytest.mark.parametrize("again", [False, True])
def test_a_rank_lost_while_its_generation_is_opened_does_not_enter_it(monkeypatch, again: bool) -> None:
    async def case() -> None:
        m = Machine(Settings(**vars(SETTINGS)))
        await m.failover.start()
        opened: list[FakeCoordinator] = []

        class Slow(FakeCoordinator):
            @classmethod
            async def start(cls, ranks: int, seats: int, host: str = "") -> "FakeCoordinator":
                m.executor.kill(1)
                if again:  # its replacement is another process, which is not configured
                    m.executor.spawn(1)
                opened.append(cls())
                return opened[-1]

        monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", Slow)
        since = len(m.executor.log)
        with pytest.raises(RankLost, match="rank 1"):
            await m.failover.generations.start((0, 1, 2), {})
        assert "join" not in [what for _, what in m.executor.log[since:]]
        assert not m.failover.membership.joining
        await opened[0].wait()  # nobody waits in its service
        await m.failover.close()

    asyncio.run(case())


def test_when_a_serving_rank_is_stuck_the_replacement_that_answers_is_not_lost_with_it(monkeypatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")  # no spare process ids: a replacement needs a new generation
    monkeypatch.setattr(serving.recovery.rendezvous, "PING_TIMEOUT_S", 0.05)

    class Stuck(FakeExecutor):
        """The first process of rank 0 does not answer Ping once the replacement of rank 1 is there."""

        first_pids = 1 << 30
        stuck = 0

        async def call(self, rank: int, what: str, message) -> link_pb2.Done:
            if what == "ping" and self._ranks[rank].process.pid == self.stuck and self._pids > self.first_pids:
                await asyncio.Event().wait()
            return await super().call(rank, what, message)

        def lose_unanswered(self, ranks, what: str, why: str, *, unless_all: bool = False) -> None:
            super().lose_unanswered((0,), what, why)

    async def case() -> None:
        buckets = Machine(SETTINGS).executor
        executor = Stuck(buckets._buckets, max_pages=buckets._max_pages)
        m = Machine(SETTINGS, executor)
        await m.failover.start()
        executor.first_pids, executor.stuck = executor._pids, executor._ranks[0].process.pid
        m.loop.start()
        clients = [asyncio.create_task(m.read(request)) for request in m.requests]
        await m.begun(2)
        executor.kill(1)
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*clients)
            while set(m.failover.plan_ranks) != {0, 1, 2} or m.failover.membership.losses:
                await asyncio.sleep(0.001)
        events = m.loop.events.retained()
        assert "rejoin_failed" in [event.kind for event in events]
        assert [event.rank for event in events if event.kind == "rank_lost"] == [1, 0]
        assert executor._pids == executor.first_pids + 2, "the replacement of rank 1 was lost, too"
        await m.loop.drain(0.0)
        await m.failover.close()

    asyncio.run(case())


def test_a_replacement_that_is_not_ready_in_time_is_lost(monkeypatch) -> None:
    async def case() -> None:
        m = Machine(Settings(**{**vars(SETTINGS), "start_timeout_s": 0.01}))

        async def never(rank: int) -> link_pb2.Hello:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        monkeypatch.setattr(m.executor, "wait_attached", never)
        with pytest.raises(RankLost, match=r"not ready within 0\.01 s"):
            await m.failover.rank_start.start(1)
        process = m.executor.get(1)
        assert process is not None
        assert process.loss is not None
        await m.failover.close()

    asyncio.run(case())


def test_a_replacement_that_cannot_be_configured_is_lost_before_another_one_is_started(monkeypatch) -> None:
    async def case() -> None:
        m = Machine(Settings(**vars(SETTINGS)))

        async def fail(rank: int, what: str, message) -> link_pb2.Done:
            raise CommandFailed(rank, what, "RuntimeError: of another model")

        monkeypatch.setattr(m.executor, "call", fail)
        for _ in range(2):
            with pytest.raises(RankLost, match="RuntimeError: of another model"):
                await m.failover.rank_start.start(1)
            process = m.executor.get(1)
            assert process is not None
            assert process.loss is not None
        await m.failover.close()

    asyncio.run(case())


BOUNDED = {"configure", "ping", "join", "hold"}
"""Messages that delay heartbeats: what waits for their answer has a bound in seconds."""


@pytest.mark.parametrize("shares", [True, False])
def test_a_rank_that_others_wait_for_is_monitored_or_has_a_bound(shares: bool) -> None:
    async def case() -> None:
        m = Machine(Settings(**vars(SETTINGS)))
        m.executor.shares_memory = shares
        await m.failover.start()
        m.loop.start()
        m.executor.unmonitored_calls.clear()
        clients = [asyncio.create_task(m.read(request)) for request in m.requests]
        await m.begun(2)
        for breaks in (m.failover.mark_comm_broken, lambda: m.executor.kill(1), m.failover.mark_comm_broken):
            breaks()
            m.loop.engine.wake()
            epoch = m.failover.epoch
            async with asyncio.timeout(LIMIT_S):
                while m.failover.epoch == epoch or len(m.failover.plan_ranks) < SETTINGS.ranks:
                    await asyncio.sleep(0.001)
        await asyncio.gather(*clients)
        assert "join" in {what for _, what in m.executor.unmonitored_calls}
        assert {what for _, what in m.executor.unmonitored_calls} <= BOUNDED
        await m.loop.drain(0.0)
        await m.failover.close()

    asyncio.run(case())


def test_the_ranks_of_a_front_that_goes_on_are_monitored(monkeypatch) -> None:
    async def case() -> None:
        first = Machine(Settings(**vars(SETTINGS)))
        first.executor.shares_memory = True
        await first.failover.start()
        await first.failover.close()
        second = Machine(Settings(**vars(SETTINGS)), first.executor)
        first.executor.unmonitored_calls.clear()
        await second.failover.start()
        assert {what for _, what in second.executor.unmonitored_calls} == {"configure"}
        await second.failover.close()

    asyncio.run(case())


def test_a_rank_of_which_a_part_of_the_plan_came_into_force_stays_in_it_when_the_rest_fails() -> None:
    class Failing(FakeExecutor):
        """The replacement of rank 1 cannot obey the second Adopt that it gets."""

        adopts = 0
        first_pids = 1 << 30

        async def call(self, rank: int, what: str, message) -> link_pb2.Done:
            each = self._ranks[rank]
            if what == "adopt" and rank == 1 and each.process.pid > self.first_pids:
                self.adopts += 1
                if self.adopts == 2:
                    raise CommandFailed(rank, what, "it cannot")
            return await super().call(rank, what, message)

    async def case() -> None:
        settings = Settings(**{**vars(SETTINGS), "on_lost_expert": "mask"})
        buckets = Machine(settings).executor
        executor = Failing(buckets._buckets, max_pages=buckets._max_pages)
        m = Machine(settings, executor)
        await m.failover.start()
        executor.first_pids = executor._pids
        m.loop.start()
        clients = [asyncio.create_task(m.read(request)) for request in m.requests]
        await m.begun(2)
        executor.store.readable = False  # so that the plan with the replacement comes into force in two parts
        executor.kill(1)
        async with asyncio.timeout(LIMIT_S):
            while executor.adopts < 2:
                await asyncio.sleep(0.001)
            executor.store.readable = True
            await m.loop.apply(Instruction(action="retry"))
            await m.loop.apply(Instruction(action="scale_up", ranks=(1,)))
            while set(m.failover.plan_ranks) != {0, 1, 2} or m.failover.adoption.reconciling:
                await asyncio.sleep(0.001)
            await asyncio.gather(*clients)
        assert executor._pids == executor.first_pids + 1, "a second replacement was started"
        assert "rejoined" in [event.kind for event in m.loop.events.retained()]
        await m.loop.drain(0.0)
        await m.failover.close()

    asyncio.run(case())


class _Process:
    """A process that does nothing."""

    def __init__(self, token: str) -> None:
        self.token = token

    def signal(self, name: str) -> None: ...


class _Starter:
    def start(self, rank: int, front: str, on_exit) -> _Process:
        return _Process(str(rank))


def test_the_answer_of_a_rank_that_is_lost_before_the_others_answer_does_not_count() -> None:
    async def case() -> None:
        detector = FailureDetectorSettings(heartbeat_floor_s=1.0, step_floor_s=1.0)
        executor = RankExecutor(detector, lambda loss: None, _Starter())  # type: ignore[arg-type]
        ranks = [executor.spawn(rank) for rank in range(2)]
        asked = asyncio.create_task(executor.call_all("adopt", {0: link_pb2.Adopt(), 1: link_pb2.Adopt()}))
        commands = [await each.outbox.get() for each in ranks]
        for each, command in zip(ranks, commands, strict=True):
            assert command is not None
            executor._receive(each, link_pb2.Report(rank=each.rank, done=link_pb2.Done(id=command.id)))
            if each.rank == 0:
                executor.declare(0, Cause("error", "died"), 0.0)
        with pytest.raises(RankLost, match="rank 0"):
            await asked

    asyncio.run(case())


def test_nor_does_the_answer_to_one_command() -> None:
    async def case() -> None:
        detector = FailureDetectorSettings(heartbeat_floor_s=1.0, step_floor_s=1.0)
        executor = RankExecutor(detector, lambda loss: None, _Starter())  # type: ignore[arg-type]
        each = executor.spawn(0)
        asked = asyncio.create_task(executor.call(0, "configure", link_pb2.Configure()))
        command = await each.outbox.get()
        assert command is not None
        executor._receive(each, link_pb2.Report(rank=0, done=link_pb2.Done(id=command.id)))
        executor.declare(0, Cause("error", "died"), 0.0)  # before its answer has been looked at
        with pytest.raises(RankLost, match="rank 0"):
            await asked

    asyncio.run(case())
