"""The front dies at every message, and so may a rank while the next front takes the others over: no token is changed,
lost or sent twice (docs/decisions/0003).

As in test_recovery_machine, the real loop, failover, planner and journal run on ranks without processes.
"""

import asyncio
from pathlib import Path

import pytest

from serving.config import Settings
from serving.core.journal import Journal
from serving.core.request_log import RequestLog
from serving.protocol.request import Call, Finished, Token
from simulation.hand_model import PREPARED, alone
from tests.support.recovery_machine import APART, LIMIT_S, RANKS, SETTINGS, Machine

pytestmark = pytest.mark.usefixtures("no_processes")


class FrontDied(BaseException):
    """Nothing catches it but the end of the front."""


async def ask(m: Machine) -> None:
    """All requests, each a call of its own; read for as long as the front lives."""
    for request in m.requests:
        m.loop.register_call(Call(id=request.id, requests=(request,)))
    await asyncio.gather(*(m.read(request) for request in m.requests))


async def die(m: Machine, *tasks: asyncio.Task[None]) -> None:
    """The remains of a killed front: none of its tasks, and the ranks."""
    m.loop.engine.request_log.close()
    m.failover.kv_replicas.close()
    running = [*tasks, *m.loop.tasks]
    running += m.loop._pipeline.answers
    running += [m.failover.meshes._loading, m.failover.joining._task, m.failover._rendezvous._monitoring]
    for task in filter(None, running):
        task.cancel()
    await asyncio.gather(*filter(None, running), return_exceptions=True)


async def asked(folder: Path, settings: Settings, shares: bool, tokens: int) -> tuple[Machine, asyncio.Task[None]]:
    """A front whose streams have so many tokens each, and what reads them."""
    journal, records = Journal.open(folder)
    first = Machine(settings, request_log=RequestLog(journal, records))
    first.executor.shares_memory = shares
    await first.failover.start()
    first.loop.start()
    asking = asyncio.create_task(ask(first))
    await first.begun(tokens)
    return first, asking


async def play(folder: Path, settings: dict, shares: bool, at: int, then: int | None, victim: int) -> tuple[int, int]:
    """The front dies at message `at` after its streams have begun; of the messages of the one after it, at number
    `then` the victim dies. How many messages there were of either."""
    chosen = Settings(**{**vars(SETTINGS), **settings})
    first, asking = await asked(folder, chosen, shares, 3)
    since, dead = len(first.executor.log), asyncio.Event()

    def front_dies(number: int, rank: int, what: str) -> None:
        if number == since + at:
            dead.set()
            raise FrontDied

    first.executor.fails = front_dies
    async with asyncio.timeout(LIMIT_S):
        done, _ = await asyncio.wait({asking, asyncio.create_task(dead.wait())}, return_when=asyncio.FIRST_COMPLETED)
    before = len(first.executor.log) - since
    await die(first, *({asking} - done))
    told = {request: list(tokens) for request, tokens in first.tokens.items()}

    journal, records = Journal.open(folder)
    second = Machine(chosen, first.executor, RequestLog(journal, records))
    began = len(second.executor.log)
    second.executor.fails = lambda number, rank, what: victim if then is not None and number == began + then else None
    try:
        async with asyncio.timeout(LIMIT_S):
            await second.failover.start()
            second.loop.start()
            if then is None and at > 20:  # the first pages of all prompts are full by then
                assert sum(len(pool.evictable) for pool in second.loop.engine.state.pools.values()) >= len(
                    second.requests
                )
            for request in second.requests:
                items = [item async for item in second.loop.replay(request.id)]
                said = [item.id for item in items if isinstance(item, Token)]
                assert said == alone(request, PREPARED.max_context)[0]
                assert said[: len(told[request.id])] == told[request.id]
                assert items[-1] == Finished("length")
            while set(second.failover.plan_ranks) != set(range(RANKS)) or second.failover.adoption.reconciling:
                await asyncio.sleep(0.001)
        assert second.loop.status().failed == 0
        return before, len(second.executor.log) - began
    finally:
        await second.loop.drain(0.0)
        await second.failover.close()


async def lose_front_and_rank(folder: Path, shares: bool) -> None:
    """The front dies once the first pages of all prompts are full, and a rank when the next one has all streams going
    on: what the rank wrote for either is restored."""
    first, asking = await asked(folder, SETTINGS, shares, 20)
    await die(first, asking)

    journal, records = Journal.open(folder)
    second = Machine(SETTINGS, first.executor, RequestLog(journal, records))
    try:
        async with asyncio.timeout(LIMIT_S):
            await second.failover.start()
            second.loop.start()
            kept = second.loop.status().tokens
            rank = second.executor.get(1)
            assert rank is not None
            while second.loop.status().tokens < kept + len(second.requests) or rank.uncopied is not None:
                await asyncio.sleep(0)
            there = sum(
                s.without_in_flight().computed for s in second.loop.engine.state.running.values() if s.rank == 1
            )
            second.executor.kill(1)
            for request in second.requests:
                said = [item.id async for item in second.loop.replay(request.id) if isinstance(item, Token)]
                assert said == alone(request, PREPARED.max_context)[0]
        assert second.loop.status().tokens_restored >= there > 0
        assert second.loop.status().tokens_recomputed == 0
        assert not [event for event in second.loop.events.retained() if event.kind == "not_restored"]
    finally:
        await second.loop.drain(0.0)
        await second.failover.close()


@pytest.mark.parametrize("shares", [True, False])
def test_copies_of_caches_outlive_the_front(tmp_path: Path, shares: bool) -> None:
    asyncio.run(lose_front_and_rank(tmp_path, shares))


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("settings", [{}, {"kv_replication": "off", **APART}])
def test_a_front_may_die_at_any_message(tmp_path: Path, settings: dict, shares: bool) -> None:
    for at in range(len(settings), 40, 4):
        asyncio.run(play(tmp_path / str(at), settings, shares, at, None, 0))


EVERY = 5
"""Of the messages and ranks of a case, every run of the tests has one in so many; the simulator draws the others."""


@pytest.mark.parametrize(("settings", "shares"), [({}, True), ({}, False), (APART, True)])
def test_a_rank_may_die_at_any_message_of_the_front_that_takes_over(
    tmp_path: Path, settings: dict, shares: bool
) -> None:
    _, messages = asyncio.run(play(tmp_path / "whole", settings, shares, 5, None, 0))
    for then in range(min(messages, 30)):
        for victim in range(RANKS):
            if (RANKS * then + victim + len(settings)) % EVERY:
                continue
            try:
                asyncio.run(play(tmp_path / f"{then}-{victim}", settings, shares, 5, then, victim))
            except BaseException as error:
                raise AssertionError(f"rank {victim} died at message {then}") from error
