"""One request that breaks every rank it runs on: it ends, once, and nobody else does; also over fronts and restarts.

The real loop, failover, planner and journal run on ranks without processes.
"""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from serving.config import Settings
from serving.core import step_runner
from serving.core.journal import Journal
from serving.core.request_log import RequestLog
from serving.errors import InvalidRequest, PoisonRequest
from serving.protocol.events import EventKind
from serving.protocol.request import Call, Request
from simulation.hand_model import PREPARED, alone, small_request
from tests.serving.recovery.test_front_death import die
from tests.support.recovery_machine import LIMIT_S, RANKS, SETTINGS, Machine

pytestmark = pytest.mark.usefixtures("no_processes")

SEED = 666
POISON = small_request("poison", range(20), max_tokens=24, seed=SEED)


def has_poison(arrays: dict[str, np.ndarray]) -> bool:
    """Whether a step samples a token of the request that breaks ranks."""
    return bool((arrays["seed"] == SEED).any())


def kinds(m: Machine) -> list[str]:
    return [str(event.kind) for event in m.loop.events.retained()]


async def ask(m: Machine, request: Request) -> Exception | None:
    """One call of one request; the error that it ends with."""
    m.loop.register_call(Call(id=request.id, requests=(request,)))
    try:
        async for _ in m.loop.stream(request):
            pass
    except (PoisonRequest, InvalidRequest) as error:
        return error
    return None


async def whole(m: Machine) -> None:
    while set(m.failover.plan_ranks) != set(range(RANKS)) or m.failover.adoption.reconciling:
        await asyncio.sleep(0.001)


async def play(limit: int = 2, lookahead: bool = True) -> Machine:
    m = Machine(Settings(**{**vars(SETTINGS), "poison_limit": limit, "lookahead": lookahead}))
    await m.failover.start()
    m.loop.start()
    clients = [asyncio.create_task(m.read(request)) for request in m.requests]
    try:
        await m.begun(3)
        m.executor.breaks = has_poison
        async with asyncio.timeout(LIMIT_S):
            error = await ask(m, POISON)
            await asyncio.gather(*clients)
            await whole(m)
        assert isinstance(error, PoisonRequest)
        return m
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("limit", [2, 3])
def test_it_ends_after_as_many_losses_and_the_others_go_on_unchanged(limit: int, lookahead: bool) -> None:
    m = asyncio.run(play(limit, lookahead))
    for request in m.requests:
        assert m.tokens[request.id] == alone(request, PREPARED.max_context)[0]
    status = m.loop.status()
    assert (status.failed, status.convicted, status.suspects) == (1, 1, 0)
    assert status.finished == len(m.requests)
    assert kinds(m).count(EventKind.RANK_LOST) == limit
    assert kinds(m).count(EventKind.CONVICTED) == 1
    assert [rank.last_failure for rank in status.ranks].count("raised: IndexError: out of bounds | File steps.py") >= 1


def test_an_operator_may_kill_any_rank_under_a_stream_and_nobody_is_suspected() -> None:
    async def run() -> None:
        m = Machine(SETTINGS)
        await m.failover.start()
        m.loop.start()
        clients = [asyncio.create_task(m.read(request)) for request in m.requests]
        try:
            async with asyncio.timeout(LIMIT_S):
                await m.begun(2)
                for _ in range(4):
                    lost = {sequence.rank for sequence in m.loop.engine.state.running.values()}
                    m.executor.kill(min(rank for rank in lost if rank is not None))
                    await asyncio.sleep(0.01)
                    await whole(m)
                await asyncio.gather(*clients)
            assert not {EventKind.SUSPECTED, EventKind.CONVICTED}.intersection(kinds(m))
            assert m.loop.status().failed == 0
        finally:
            await m.loop.drain(0.0)
            await m.failover.close()

    asyncio.run(run())


def test_ranks_that_crash_for_no_request_end_nobody() -> None:
    async def run() -> None:
        m = Machine(SETTINGS)
        await m.failover.start()
        m.loop.start()
        clients = [asyncio.create_task(m.read(request)) for request in m.requests]
        try:
            async with asyncio.timeout(LIMIT_S):
                for tokens in (3, 9, 15):
                    await m.begun(tokens)
                    m.executor.crash(min(m.failover.plan_ranks))
                    while EventKind.RECOVERED not in kinds(m)[-3:] and not all(map(asyncio.Task.done, clients)):
                        await asyncio.sleep(0)
                await asyncio.gather(*clients)
            assert EventKind.SUSPECTED in kinds(m)
            assert EventKind.CLEARED in kinds(m)
            assert EventKind.CONVICTED not in kinds(m)
        finally:
            await m.loop.drain(0.0)
            await m.failover.close()

    asyncio.run(run())


def test_a_step_that_fails_again_and_again_on_living_ranks_ends_its_request_too(monkeypatch) -> None:
    monkeypatch.setattr(step_runner, "SETTLE_S", 0.01)

    async def run() -> None:
        m = Machine(SETTINGS)
        await m.failover.start()
        m.loop.start()
        clients = [asyncio.create_task(m.read(request)) for request in m.requests]
        try:
            await m.begun(3)
            m.executor.refuses = has_poison
            async with asyncio.timeout(LIMIT_S):
                error = await ask(m, POISON)
                await asyncio.gather(*clients)
            assert isinstance(error, PoisonRequest)
            assert kinds(m).count(EventKind.STEP_FAILED) == 4
            assert EventKind.RANK_LOST not in kinds(m)
        finally:
            await m.loop.drain(0.0)
            await m.failover.close()

    asyncio.run(run())


def opened(folder: Path, executor=None) -> Machine:
    journal, records = Journal.open(folder)
    m = Machine(SETTINGS, executor, RequestLog(journal, records))
    m.executor.breaks = has_poison
    return m


async def front_dies_between(folder: Path, *, restart: bool) -> None:
    """The front dies after the first loss; the next one has its ranks, or new ones, and the journal."""
    first = opened(folder)
    await first.failover.start()
    first.loop.start()
    asking = asyncio.create_task(ask(first, POISON))
    async with asyncio.timeout(LIMIT_S):
        while EventKind.SUSPECTED not in kinds(first):
            await asyncio.sleep(0)
    await die(first, asking)
    assert kinds(first).count(EventKind.RANK_LOST) == 1
    second = opened(folder, None if restart else first.executor)
    async with asyncio.timeout(LIMIT_S):
        await second.failover.start()
        second.loop.start()
        with pytest.raises(PoisonRequest):
            async for _ in second.loop.replay(POISON.id):
                pass
        await whole(second)
    assert kinds(second).count(EventKind.RANK_LOST) == 1
    await second.loop.drain(0.0)
    await die(second)
    third = opened(folder)
    async with asyncio.timeout(LIMIT_S):
        await third.failover.start()
        third.loop.start()
        with pytest.raises(PoisonRequest):
            async for _ in third.loop.replay(POISON.id):
                pass
        assert await ask(third, small_request("other", range(4), max_tokens=4)) is None
    assert EventKind.RANK_LOST not in kinds(third)
    await third.loop.drain(0.0)
    await third.failover.close()


@pytest.mark.parametrize("restart", [False, True])
def test_losses_are_counted_over_fronts_and_restarts_and_it_is_never_run_again(tmp_path: Path, restart: bool) -> None:
    asyncio.run(front_dies_between(tmp_path, restart=restart))


def test_a_request_of_a_journal_with_a_token_that_the_model_lacks_is_not_run(tmp_path: Path) -> None:
    async def run() -> None:
        bad = small_request("bad", [1, PREPARED.vocab_size], max_tokens=4)
        good = small_request("good", [1, 2], max_tokens=4, stop_tokens=frozenset((5000,)))
        journal, records = Journal.open(tmp_path)
        log = RequestLog(journal, records)
        for request in (bad, good):
            log.register_call(Call(id=request.id, requests=(request,)))
            log.record_accepted(request.id)
        log.close()
        m = opened(tmp_path)
        await m.failover.start()
        m.loop.start()
        try:
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(InvalidRequest, match="this model's vocabulary has 97 tokens"):
                    async for _ in m.loop.replay("bad"):
                        pass
                ended = [item async for item in m.loop.replay("good")]
            assert len(ended) == 5
            assert EventKind.RANK_LOST not in kinds(m)
        finally:
            await m.loop.drain(0.0)
            await m.failover.close()

    asyncio.run(run())
