"""The take-over: a front goes on after the last epoch of its ranks, and without ranks that did not come back only
once they have ended."""

import asyncio
import dataclasses

import pytest

from serving.proto.moejax.v1 import link_pb2
from tests.support.fake_executor import FakeExecutor
from tests.support.recovery_machine import SETTINGS, Machine

pytestmark = pytest.mark.usefixtures("no_processes")


async def take_over(executor: FakeExecutor) -> Machine:
    """A front that goes on with the ranks of one that has died."""
    first = Machine(SETTINGS, executor)
    await first.failover.start()
    await first.failover.close()
    second = Machine(SETTINGS, executor)
    await second.failover.start()
    return second


def test_commands_of_the_last_front_that_end_after_a_rank_has_attached_count() -> None:
    class Late(FakeExecutor):
        """Its ranks obey an Adopt of the first front, of epoch 7, while they attach to the second one."""

        attached = 0

        async def wait_attached(self, rank: int) -> link_pb2.Hello:
            hello = await super().wait_attached(rank)
            self.attached += 1
            if self.attached > SETTINGS.ranks:
                self._ranks[rank].epoch = self._ranks[rank].last_epoch = 7
            return hello

    async def scenario() -> None:
        first = Machine(SETTINGS)
        executor = Late(first.executor._buckets, max_pages=first.executor._max_pages)
        second = await take_over(executor)
        assert second.failover.epoch == 8
        await second.failover.close()

    asyncio.run(scenario())


def test_a_rank_that_does_not_come_back_has_ended_before_a_plan_without_it_is_adopted() -> None:
    class Silent(FakeExecutor):
        """Rank 1 does not attach to the second front."""

        attached = 0

        async def wait_attached(self, rank: int) -> link_pb2.Hello:
            self.attached += 1
            if self.attached > SETTINGS.ranks and rank == 1:
                raise TimeoutError
            return await super().wait_attached(rank)

        async def fenced(self, rank: int) -> None:
            await super().fenced(rank)
            self.log.append((rank, "fenced"))

    async def scenario() -> None:
        first = Machine(SETTINGS)
        executor = Silent(first.executor._buckets, max_pages=first.executor._max_pages)
        second = await take_over(executor)
        assert second.failover.plan_ranks == (0, 2)
        since = executor.log[executor.log.index((1, "fenced")) :]
        assert (0, "adopt") in since
        assert (2, "adopt") in since
        assert (1, "fenced") not in since[1:]
        assert len([each for each in executor.log if each[1] == "adopt"]) == SETTINGS.ranks + 2
        await second.failover.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("channel", ["memory", "stream"])
@pytest.mark.parametrize("sends", [True, False])
def test_pages_of_prompts_that_no_replica_has_are_not_found_where_another_pool_must_have_them(
    channel: str, sends: bool
) -> None:
    settings = dataclasses.replace(SETTINGS, kv_replication=channel)
    page, key = 3, b"k" * 16

    async def scenario() -> None:
        first = Machine(settings, sends_entries=sends)
        await first.failover.start()
        await first.failover.close()
        for rank in first.executor._ranks.values():
            rank.index._keys = {page: key}
        second = Machine(settings, first.executor, sends_entries=sends)
        await second.failover.start()
        reopened = all(second.failover.kv_replicas.is_reopened(rank) for rank in range(SETTINGS.ranks))
        known = second.failover.take_over.take_known_pages()
        assert known == ({} if sends and not reopened else {rank: {page: key} for rank in range(SETTINGS.ranks)})
        assert not reopened or channel == "memory"
        await second.failover.close()

    asyncio.run(scenario())


def test_a_rank_with_later_weights_than_those_on_record_is_ended_and_the_others_go_on() -> None:
    async def scenario() -> None:
        first = Machine(SETTINGS)
        await first.failover.start()
        await first.failover.close()
        first.executor._ranks[1].weights = 1  # the record of version 1 was deleted
        second = Machine(SETTINGS, first.executor)
        await second.failover.start()
        assert second.failover.plan_ranks == (0, 2)
        loss = first.executor._ranks[1].loss
        assert loss is not None
        assert "has weights number 1, and those in force are 0" in str(loss.cause)
        await second.failover.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("served", [False, True])
def test_a_rank_that_is_lost_before_the_others_have_attached_is_not_counted_on(served: bool) -> None:
    class Dying(FakeExecutor):
        """Rank 1 ends once it has answered the second front, which waits for rank 2."""

        attached = since = 0

        async def wait_attached(self, rank: int) -> link_pb2.Hello:
            self.attached += 1
            if self.attached > SETTINGS.ranks and rank == 2:
                while (1, "configure") not in self.log[self.since :]:
                    await asyncio.sleep(0)
                await asyncio.sleep(0.01)
                self.kill(1)
            return await super().wait_attached(rank)

    async def scenario() -> None:
        first = Machine(SETTINGS)
        executor = Dying(first.executor._buckets, max_pages=first.executor._max_pages)
        first = Machine(SETTINGS, executor)
        await first.failover.start()
        await first.failover.close()
        executor.since = len(executor.log)
        if not served:
            executor.kill(1)
            executor.spawn(1)
        second = Machine(SETTINGS, executor)
        await second.failover.start()
        assert second.failover.plan_ranks == (0, 2)
        assert not second.failover.membership.is_incoming(1)
        await second.failover.close()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_ranks_that_had_not_served_have_ended_before_they_are_started_again() -> None:
    class Slow(FakeExecutor):
        """Its lost ranks end a while after they were killed."""

        async def fenced(self, rank: int) -> None:
            await super().fenced(rank)
            await asyncio.sleep(0.01)
            self.log.append((rank, "fenced"))

        def spawn(self, rank: int):
            self.log.append((rank, "spawn"))
            return super().spawn(rank)

    async def scenario() -> None:
        first = Machine(SETTINGS)
        executor = Slow(first.executor._buckets, max_pages=first.executor._max_pages)
        for rank in range(SETTINGS.ranks):
            executor.spawn(rank)
        executor.log.clear()
        front = Machine(SETTINGS, executor)
        await front.failover.start()
        starts = [each for each in executor.log if each[1] in ("fenced", "spawn")]
        assert sorted(starts[: SETTINGS.ranks]) == [(rank, "fenced") for rank in range(SETTINGS.ranks)]
        assert sorted(starts[SETTINGS.ranks :]) == [(rank, "spawn") for rank in range(SETTINGS.ranks)]
        assert front.failover.plan_ranks == (0, 1, 2)
        await front.failover.close()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_ranks_that_die_once_their_plan_is_in_force_do_not_count_as_lost_when_all_are_started_again() -> None:
    class Dying(FakeExecutor):
        """All ranks end when the second front connects them."""

        dies = False

        async def call_all(self, what: str, messages) -> list[link_pb2.Done]:
            if what == "connect" and self.dies:
                self.dies = False
                for rank in range(SETTINGS.ranks):
                    self.kill(rank)
            return await super().call_all(what, messages)

    async def scenario() -> None:
        first = Machine(SETTINGS)
        executor = Dying(first.executor._buckets, max_pages=first.executor._max_pages)
        first = Machine(SETTINGS, executor)
        await first.failover.start()
        await first.failover.close()
        executor.dies = True
        second = Machine(SETTINGS, executor)
        await second.failover.start()
        assert not executor.dies
        assert second.failover.plan_ranks == (0, 1, 2)
        assert not second.failover.membership.losses
        assert not second.failover.membership.wanted
        await second.failover.close()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))
