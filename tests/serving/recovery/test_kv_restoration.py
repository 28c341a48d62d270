"""The loop restores recoverable KV where its measurements favour that, and computes it again where that fails."""

import asyncio
from types import SimpleNamespace
from unittest import mock

import pytest

import serving.core.loop
import serving.executor.kv_replica
import serving.recovery.kv_restoration
import serving.recovery.rendezvous
from serving.config import Settings
from serving.engine import hand_over
from serving.engine.restore_cost import LinearFit, RestoreCosts
from serving.engine.sequence import RecoverableKV, Sequence
from serving.protocol.instructions import Instruction
from serving.recovery.kv_restoration import KVRestoration
from simulation.hand_model import PREPARED, alone, small_limits, small_request
from simulation.hand_rank import HandRank
from tests.support.fake_executor import FakeCoordinator
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine
from tests.support.replicated_engine import ReplicatedEngine

FREE = Settings(**{**vars(SETTINGS), "restart": False, "prefix_caching": False})


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)


async def lose_one(spoil=None, *, victims: tuple[int, ...] = (1,), streams: int = 6) -> tuple[Machine, dict]:
    """Ranks die while all stream; `spoil` does something to the server then. The events after it, by kind."""
    m = Machine(FREE)
    m.requests = m.requests[:streams]
    m.tokens = {request.id: [] for request in m.requests}
    await m.failover.start()
    m.loop.start()
    clients = [asyncio.create_task(m.read(request)) for request in m.requests]
    try:
        await m.begun()
        for victim in victims:
            m.executor.kill(victim)
        if spoil is not None:
            spoil(m)
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*clients)
        for request in m.requests:
            assert m.tokens[request.id] == alone(request, PREPARED.max_context)[0]
        return m, {event.kind: event for event in m.loop.events.retained()}
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


def choose(monkeypatch: pytest.MonkeyPatch, restored: bool) -> None:
    monkeypatch.setattr(serving.recovery.kv_restoration, "should_restore", lambda *_, **__: restored)


def test_events_and_counts_say_what_was_restored(monkeypatch):
    choose(monkeypatch, True)
    m, events = asyncio.run(lose_one())
    status = m.loop.status()
    assert status.tokens_restored >= 2 * 12
    assert f"{status.tokens_restored} cache entries to restore, " in events["recovered"].message
    assert events["cache_restored"].message == f"{status.tokens_restored} cache entries of 2 requests"
    assert status.protection == "memory"


def test_where_it_would_be_slower_everything_is_computed_again(monkeypatch):
    choose(monkeypatch, False)
    m, events = asyncio.run(lose_one())
    assert "cache_restored" not in events
    assert m.loop.status().tokens_restored == 0
    assert m.loop.status().tokens_recomputed >= 2 * 12
    assert all(what != "restore_cache" for _, what in m.executor.log)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_pool_whose_prompts_go_elsewhere_restores_whatever_its_own_steps_seem_to_cost(elsewhere, monkeypatch):
    """It measures no prompts: to it, computing one seems to cost nothing."""
    monkeypatch.setattr(KVRestoration, "record_step", lambda *_: None)
    costs = RestoreCosts(step=LinearFit.guess(0.0, 0.0, 64), piece=LinearFit.guess(1.0, 0.0, 256))

    def spoil(m: Machine) -> None:
        m.loop.engine.restoration.costs = costs
        m.loop.engine.restoration.prompts_go_elsewhere = lambda: elsewhere

    m, _ = asyncio.run(lose_one(spoil))
    assert (m.loop.status().tokens_restored > 0) == elsewhere


@pytest.mark.parametrize(
    ("piece_s", "step_s", "victims", "before"),
    [(1e-3, 0.1, (1,), False), (1e-3, 0.1, (1, 2), True), (0.02, 0.01, (1, 2), False), (1.0, 10.0, (1, 2), False)],
)
def test_it_comes_before_the_first_step_where_no_more_streams_wait_for_that_and_it_takes_less(
    piece_s, step_s, victims, before, monkeypatch
):
    choose(monkeypatch, True)
    costs = RestoreCosts(step=LinearFit.guess(step_s, 0.0, 64), piece=LinearFit.guess(piece_s, 0.0, 256))

    def spoil(m: Machine) -> None:
        m.loop.engine.restoration.costs = costs

    m, _ = asyncio.run(lose_one(spoil, victims=victims))
    said = [what for _, what in m.executor.log]
    after = said[len(said) - said[::-1].index("adopt") :]
    assert (after.index("restore_cache") < after.index("step")) == before


def test_a_copy_that_has_something_else_is_refused_and_the_requests_are_computed_again(monkeypatch):
    choose(monkeypatch, True)

    def spoil(m: Machine) -> None:
        for kept in m.failover.kv_replicas._lost.values():
            kept.replica._tags[:, 0] += 1

    m, events = asyncio.run(lose_one(spoil))
    assert "is wanted" in events["not_restored"].cause
    assert m.loop.status().tokens_restored == 0
    assert m.loop.status().tokens_recomputed >= 2 * 12
    assert m.failover.membership.generation == 1


def test_a_copy_that_is_gone_is_done_without(monkeypatch):
    choose(monkeypatch, True)

    def spoil(m: Machine) -> None:
        monkeypatch.setattr(m.failover.kv_replicas, "replica", lambda _: None)

    _, events = asyncio.run(lose_one(spoil))
    assert "the replica was closed" in events["not_restored"].cause


def test_nothing_else_needs_to_run_for_a_restoration_to_go_on(monkeypatch):
    choose(monkeypatch, True)
    monkeypatch.setattr(serving.core.loop, "IDLE_S", 10 * LIMIT_S)
    monkeypatch.setattr(serving.executor.kv_replica, "PIECE_ENTRIES", 3)
    monkeypatch.setattr(serving.recovery.kv_restoration, "MIN_BUDGET_S", 0.0)
    monkeypatch.setattr(serving.recovery.kv_restoration, "MAX_BUDGET_S", 0.0)
    _, events = asyncio.run(lose_one(victims=(0,), streams=1))
    assert "of 1 requests" in events["cache_restored"].message


def test_a_rank_that_cannot_open_copies_is_sent_the_entries(monkeypatch):
    choose(monkeypatch, True)
    sent = []

    def spoil(m: Machine) -> None:
        m.failover.kv_replicas._live[0].streamed = True
        restore = HandRank.restore_cache

        def seen(each, message):
            sent.append((each.rank, message.cache_copy == "", len(message.rows) > 0))
            return restore(each, message)

        monkeypatch.setattr(HandRank, "restore_cache", seen)

    asyncio.run(lose_one(spoil))
    assert {(rank, bare, rows) for rank, bare, rows in sent} == {(0, True, True), (2, False, False)}


def test_a_client_that_leaves_while_its_context_is_restored_takes_nothing_along(monkeypatch):
    choose(monkeypatch, True)
    m = asyncio.run(leave_in_the_middle())
    assert m.loop.status().failed == 0
    assert all(not pool.used for pool in m.loop.engine.state.pools.values())
    assert m.tokens["r1"] == alone(m.requests[1], PREPARED.max_context)[0]


def test_a_client_that_leaves_while_another_request_is_moved_stays_gone():
    m = asyncio.run(leave_in_the_middle("read_cache"))
    assert m.loop.status().finished == len(m.requests)  # each once
    assert all(not pool.used for pool in m.loop.engine.state.pools.values())
    assert m.tokens["r1"] == alone(m.requests[1], PREPARED.max_context)[0]


async def leave_in_the_middle(message: str = "restore_cache") -> Machine:
    """The client of a request leaves while a rank has a message: one that restores it, or that moves it in a drain."""
    m = Machine(FREE)
    await m.failover.start()
    m.loop.start()
    clients = [asyncio.create_task(m.read(request)) for request in m.requests]
    try:
        await m.begun()
        gone = m.loop.engine.state.running["r0"].rank
        assert gone is not None
        answer = getattr(HandRank, message)

        def leave(each, told):
            clients[0].cancel()
            m.loop.abort("r0")
            return answer(each, told)

        with mock.patch.object(HandRank, message, leave):
            if message == "restore_cache":
                m.executor.kill(gone)
            else:
                await m.loop.apply(Instruction(action="drain", ranks=(gone,)))
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*clients, return_exceptions=True)
        return m
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


def test_steps_and_pieces_are_measured(monkeypatch):
    choose(monkeypatch, True)
    m, _ = asyncio.run(lose_one())
    assert m.loop.engine.restoration.costs.step.weight > 10
    assert m.loop.engine.restoration.costs.piece != type(m.loop.engine.restoration.costs).guess(8).piece


@pytest.mark.parametrize(("others", "sent", "pieces"), [(True, True, 1), (False, True, 3), (True, False, 3)])
def test_streams_wait_for_one_piece_at_a_time_of_a_request_that_another_pool_sends(others, sent, pieces):
    engine = ReplicatedEngine(small_limits(), {0: 16}, way="memory", most_pages=16)
    if others:
        engine.submit(small_request("stream", max_tokens=20))
        engine.step()
    arriving = Sequence(small_request("prompt", range(60)), engine.state.arrivals)
    engine.state = hand_over.receive(engine.state, arriving, RecoverableKV((1,), tuple(range(8)), 60, None, sent=sent))
    calls = []

    async def call_all(what, messages):
        calls.append(messages)

    places = SimpleNamespace(kv_locations=lambda rank, pages: [(rank, pages)])
    server = SimpleNamespace(
        state=engine.state,
        failover=SimpleNamespace(adoption=places, epoch=0),
        executor=SimpleNamespace(call_all=call_all),
        events=SimpleNamespace(emit=lambda *_, **__: None),
    )
    restoration = KVRestoration(server, engine.replicas)
    restoration._piece = 20
    asyncio.run(restoration.run())
    assert len(calls) == pieces
    engine.close()
