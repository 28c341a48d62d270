"""Generations of ranks: process ids are used once, and a rank that can never join does not keep the others out."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

import serving.recovery.rendezvous
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.recovery.rendezvous import (
    JOIN_TIMEOUT_S,
    MAX_JOIN_FAILURES,
    PING_TIMEOUT_S,
    SPARE_PROCESS_IDS,
    Rendezvous,
)
from simulation.virtual_time import VirtualTimeLoop
from tests.support.fake_executor import FakeCoordinator
from tests.support.waiting import until


class Ranks:
    """Ranks that answer every command, but for those in `failing`, `lost` and `silent`, each to the command `fails`."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str, link_pb2.Join | link_pb2.Seat]] = []
        self.fails = "join"
        self.failing: set[int] = set()
        self.lost: set[int] = set()
        self.silent: set[int] = set()
        self.declared: list[int] = []

    async def call(self, rank: int, what: str, message) -> None:
        self.calls.append((rank, what, message))
        await asyncio.sleep(0)
        if what not in (self.fails, "seat"):
            return
        if rank in self.lost:
            raise RankLost(rank, "exited")
        if rank in self.failing:
            raise CommandFailed(rank, what, "no")
        if rank in self.silent:
            await asyncio.Event().wait()

    async def call_all(self, what: str, messages) -> None:
        await asyncio.gather(*(self.call(rank, what, message) for rank, message in messages.items()))

    def declare(self, rank: int, cause, evidence_at: float) -> None:
        self.declared.append(rank)

    def lose_unanswered(self, ranks, what: str, why: str, *, unless_all: bool = False) -> None:
        self.declared += sorted(self.silent.intersection(ranks)) if what == self.fails else []


@pytest.fixture(autouse=True)
def fake_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)


def run(case: Callable[[Rendezvous, Ranks, list[str]], Awaitable[None]]) -> None:
    async def whole() -> None:
        ranks, exits = Ranks(), []
        rendezvous = Rendezvous(ranks, "127.0.0.1", exits.append)  # type: ignore[arg-type]
        try:
            await case(rendezvous, ranks, exits)
        finally:
            await rendezvous.close()

    asyncio.run(whole())


async def enter(rendezvous: Rendezvous) -> None:
    """Have the ranks of a generation answer, then enter it."""
    await rendezvous.ping_all()
    await rendezvous.join_all({})


def has_ended(service: object) -> bool:
    assert isinstance(service, FakeCoordinator)
    return service.ended


def joins(ranks: Ranks) -> dict[int, link_pb2.Join]:
    return {rank: message for rank, what, message in ranks.calls if what == "join"}


def test_all_ranks_of_a_generation_get_the_same_members_and_keep_their_own_pages() -> None:
    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        await rendezvous.open((1, 4, 7), 1)
        await rendezvous.join_all({4: 9})
        found = joins(ranks)
        assert set(found) == {1, 4, 7}
        assert {rank: join.pages_used for rank, join in found.items()} == {1: 0, 4: 9, 7: 0}
        assert {(tuple(j.members), tuple(j.seats), j.generation) for j in found.values()} == {((1, 4, 7), (1, 2, 3), 1)}
        assert {join.processes for join in found.values()} == {1 + 3 + SPARE_PROCESS_IDS}

    run(case)


def test_a_process_id_is_given_to_one_rank_only_until_none_is_left() -> None:
    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        await rendezvous.open((0, 1), 1)
        await rendezvous.join_all({})
        used = {0, 1, 2}
        for number in range(SPARE_PROCESS_IDS):
            assert rendezvous.spare_count == SPARE_PROCESS_IDS - number
            rendezvous.forget(1)
            process_id = await rendezvous.join(1)
            assert process_id not in used
            used.add(process_id)
        assert rendezvous.spare_count == 0
        assert dict(zip(joins(ranks)[1].members, joins(ranks)[1].seats, strict=True)) == {0: 1, 1: max(used)}
        await rendezvous.open((0, 1), 2)
        await rendezvous.join_all({})
        assert {join.generation for join in joins(ranks).values()} == {2}
        assert rendezvous.spare_count == SPARE_PROCESS_IDS

    run(case)


def test_on_a_gpu_every_replacement_needs_a_new_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")

    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        await rendezvous.open((0, 1), 1)
        assert rendezvous.spare_count == 0

    run(case)


def test_a_rank_that_fails_to_join_time_after_time_is_declared_lost() -> None:
    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        ranks.failing = {1}
        for number in range(1, MAX_JOIN_FAILURES + 1):
            await rendezvous.open((0, 1), 1)
            with pytest.raises(CommandFailed):
                await rendezvous.join_all({})
            assert ranks.declared == ([1] if number == MAX_JOIN_FAILURES else [])

    run(case)


def test_one_success_forgets_the_failures_before_it() -> None:
    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        for number in range(2 * MAX_JOIN_FAILURES):
            ranks.failing = set() if number % MAX_JOIN_FAILURES == MAX_JOIN_FAILURES - 1 else {1}
            await rendezvous.open((0, 1), 1)
            if ranks.failing:
                with pytest.raises(CommandFailed):
                    await rendezvous.join_all({})
            else:
                await rendezvous.join_all({})
        assert ranks.declared == []

    run(case)


@pytest.mark.parametrize(("fails", "platform"), [("ping", "cpu"), ("ping", "cuda"), ("join", "cuda")])
def test_ranks_that_do_not_answer_in_time_are_lost_and_the_service_ends(
    monkeypatch: pytest.MonkeyPatch, fails: str, platform: str
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setattr(serving.recovery.rendezvous, f"{fails.upper()}_TIMEOUT_S", 0.2)

    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        ranks.silent, ranks.fails = {1}, fails
        await rendezvous.open((0, 1), 1)
        with pytest.raises(TimeoutError, match=f"no answer to {fails} within 0.2 s"):
            await enter(rendezvous)
        assert ranks.declared == [1]
        assert bool(joins(ranks)) == (fails == "join"), "a rank waited for one that is stuck"
        await until(lambda: exits)

    run(case)


@pytest.mark.parametrize("how", ["lost", "failing", "silent"])
def test_a_rank_that_does_not_enter_takes_the_service_from_no_other(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "JOIN_TIMEOUT_S", 0.05)

    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        await rendezvous.open((0, 1), 1)
        await enter(rendezvous)
        before = rendezvous.coordinator
        setattr(ranks, how, {1})
        await rendezvous.open((0, 1), 2)
        failed = rendezvous.coordinator
        with pytest.raises((RankLost, CommandFailed, TimeoutError)):
            await enter(rendezvous)
        assert ranks.declared == ([1] if how == "silent" else [])
        assert not has_ended(before), "rank 0 may still be about to leave it"
        assert not has_ended(failed), "rank 0 may still be about to enter it"
        setattr(ranks, how, set())
        await rendezvous.open((0,), 3)
        await enter(rendezvous)
        assert has_ended(before)
        assert has_ended(failed)
        assert not has_ended(rendezvous.coordinator)
        assert exits == []

    run(case)


def test_a_rank_that_was_busy_until_the_end_of_the_time_to_answer_has_all_of_the_time_to_join() -> None:
    class Busy(Ranks):
        async def call(self, rank: int, what: str, message) -> None:
            await asyncio.sleep(0.9 * (PING_TIMEOUT_S if what == "ping" else JOIN_TIMEOUT_S))
            await super().call(rank, what, message)

    async def case() -> None:
        ranks = Busy()
        rendezvous = Rendezvous(ranks, "127.0.0.1", lambda how: None)  # type: ignore[arg-type]
        await rendezvous.open((0, 1), 1)
        await enter(rendezvous)
        assert set(joins(ranks)) == {0, 1}
        assert ranks.declared == []
        await rendezvous.close()

    loop = VirtualTimeLoop(max_turns=1_000)
    try:
        loop.run_until_complete(case())
    finally:
        loop.close()


def test_a_generation_that_is_given_up_before_a_rank_enters_it_leaves_no_service() -> None:
    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        await rendezvous.open((0, 1), 1)
        await enter(rendezvous)
        before = rendezvous.coordinator
        ranks.lost, ranks.fails = {1}, "ping"
        await rendezvous.open((0, 1), 2)
        with pytest.raises(RankLost):
            await enter(rendezvous)
        for service in (before, rendezvous.coordinator):
            assert service is not None
            async with asyncio.timeout(10.0):
                await service.process.wait()
        assert ranks.declared == []

    run(case)


def test_the_service_before_ends_when_all_are_in_the_next_and_is_not_reported() -> None:
    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        await rendezvous.open((0, 1), 1)
        await rendezvous.join_all({})
        before = rendezvous.coordinator
        assert before is not None
        await rendezvous.open((0, 1), 1)
        waiting = asyncio.create_task(before.process.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        await rendezvous.join_all({})
        assert await waiting == 0
        assert exits == []

    run(case)


def test_after_its_service_ended_a_generation_takes_no_replacement_and_it_is_reported_once() -> None:
    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        await rendezvous.open((0, 1), 1)
        await rendezvous.join_all({})
        assert rendezvous.coordinator is not None
        await rendezvous.coordinator.stop()
        await until(lambda: exits)
        assert rendezvous.spare_count == 0
        assert exits == ["the coordinator ended with code 0"]

    run(case)


def test_a_replacement_is_announced_to_all_others_also_when_one_of_them_is_lost() -> None:
    async def case(rendezvous: Rendezvous, ranks: Ranks, exits: list[str]) -> None:
        await rendezvous.open((0, 1, 2), 1)
        await rendezvous.join_all({})
        ranks.lost = {1}
        await rendezvous.announce(3, 5, (0, 1, 2))
        seats = [(rank, message.rank, message.process) for rank, what, message in ranks.calls if what == "seat"]
        assert seats == [(0, 3, 5), (1, 3, 5), (2, 3, 5)]

    run(case)
