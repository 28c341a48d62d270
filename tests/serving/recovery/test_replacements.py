"""Replacements: a rank is started once, again after a failure, and only when the plan does not count on it."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

import serving.recovery.replacements
from serving.executor.rank_errors import CommandFailed
from serving.protocol.events import EventLog
from serving.recovery.membership import RankState
from serving.recovery.membership_events import Adopted, Lost, Ready
from serving.recovery.recovery_state import RecoveryState
from serving.recovery.replacements import MAX_RESTARTS, Replacements
from tests.support.memberships import loss_of, plan_of


class Ranks:
    """Starts ranks; a rank in `failing` fails to start so many times more."""

    def __init__(self) -> None:
        self.state = RecoveryState()
        self.failing: dict[int, int] = {}
        self.started: list[int] = []
        self.may_start = asyncio.Event()
        self.may_start.set()

    def serve(self, *ranks: int) -> None:
        plan = plan_of(ranks)
        self.state.record(Adopted(plan, plan))

    async def start_rank(self, rank: int) -> None:
        self.started.append(rank)
        await self.may_start.wait()
        if self.failing.get(rank, 0):
            self.failing[rank] -= 1
            raise CommandFailed(rank, "configure", "no")
        self.state.record(Ready(rank))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(seconds: float, _sleep=asyncio.sleep) -> None:
        await _sleep(min(seconds, 0.001))

    monkeypatch.setattr(serving.recovery.replacements.asyncio, "sleep", sleep)


def run(case: Callable[[Replacements, Ranks, EventLog], Awaitable[None]]) -> None:
    async def whole() -> None:
        ranks, events = Ranks(), EventLog()
        replacements = Replacements(ranks.state, events, ranks.start_rank)
        await case(replacements, ranks, events)
        for task in replacements.tasks:
            task.cancel()

    asyncio.run(whole())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_rank_that_serves_or_is_on_its_way_is_not_started_again() -> None:
    async def case(replacements: Replacements, ranks: Ranks, events: EventLog) -> None:
        ranks.serve(0, 1)
        ranks.may_start.clear()
        for _ in range(2):
            replacements.start(0)
            replacements.start(2)
            assert ranks.state.membership.state(2) is RankState.STARTING
            await settle()
        ranks.may_start.set()
        await settle()
        replacements.start(2)
        await settle()
        assert ranks.started == [2]
        assert ranks.state.membership.state(2) is RankState.READY

    run(case)


def test_a_start_that_fails_is_tried_again_and_given_up_in_the_end() -> None:
    async def case(replacements: Replacements, ranks: Ranks, events: EventLog) -> None:
        ranks.failing = {1: 2, 2: 100}
        replacements.start(1)
        replacements.start(2)
        await asyncio.gather(*replacements.tasks)
        assert [ranks.started.count(1), ranks.started.count(2)] == [3, MAX_RESTARTS]
        membership = ranks.state.membership
        assert [membership.state(1), membership.state(2)] == [RankState.READY, RankState.LOST]
        assert [event.rank for event in events.retained()].count(2) == MAX_RESTARTS
        assert {event.kind for event in events.retained()} == {"restart_failed"}

    run(case)


def test_a_lost_rank_is_started_once_when_no_plan_counts_on_it_any_more() -> None:
    async def case(replacements: Replacements, ranks: Ranks, events: EventLog) -> None:
        ranks.serve(0, 1)
        ranks.state.record(Lost(loss_of(1)))
        replacements.start_wanted()
        await settle()
        assert ranks.started == [], "the recovery fences it first"
        ranks.serve(0)
        for _ in range(2):
            replacements.start_wanted()
            await settle()
        assert ranks.started == [1]

    run(case)


def test_an_operator_starts_a_lost_rank_only_once_the_plan_does_not_count_on_it() -> None:
    async def case(replacements: Replacements, ranks: Ranks, _: EventLog) -> None:
        ranks.serve(0, 1)
        ranks.state.record(Lost(loss_of(1)))
        replacements.start(1)
        await asyncio.sleep(0)
        assert ranks.started == []
        ranks.serve(0)
        replacements.start_wanted()
        replacements.start(1)
        await asyncio.gather(*replacements.tasks)
        assert ranks.started == [1]

    run(case)
