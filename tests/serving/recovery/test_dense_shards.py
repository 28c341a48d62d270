"""Shards of sharded dense layers: a step without one would be wrong, so none is made, whatever the policy."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest

import serving.core.loop
import serving.core.unreadable_experts
from serving.config import Settings
from serving.errors import InvalidRequest
from simulation.hand_model import PREPARED, alone
from tests.support.plans import with_masked
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine

DIVIDED = dataclasses.replace(PREPARED, sharded_layers=(0,))
BARE = {"restart": False, "survive": 0, "slots_per_rank": 2, "kv_replication": "off"}
"""Four experts in six slots of three ranks: two of each layer have no second copy."""


pytestmark = pytest.mark.usefixtures("no_processes")


@contextlib.asynccontextmanager
async def served(**settings) -> AsyncIterator[Machine]:
    """Three ranks with streams under way. Afterwards all must have ended right, and no step have lacked a shard."""
    m = Machine(Settings(**{**vars(SETTINGS), **BARE, **settings}), model=DIVIDED)
    await m.failover.start()
    m.loop.start()
    clients = [asyncio.create_task(m.read(request)) for request in m.requests]
    try:
        await m.begun()
        yield m
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*clients)
        for request in m.requests:
            assert m.tokens[request.id] == alone(request, PREPARED.max_context)[0]
        assert {layer for layer, _ in m.executor.masked_in_steps}.isdisjoint(DIVIDED.sharded_layers)
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


async def until(holds) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.001)


def only_holder(m: Machine) -> int:
    """A rank that has the only copy of something in either layer."""
    plan = m.failover.plan
    assert plan is not None
    once = plan.copies() == 1
    return next(
        r for r in plan.expert_rank_ids if all(once[i, plan.slots_of(r)[i]].any() for i in range(plan.moe_layers))
    )


@pytest.mark.parametrize("policy", ["wait", "mask", "auto"])
def test_experts_are_masked_by_policy_and_shards_never(policy):
    async def case() -> None:
        async with served(on_lost_expert=policy, lost_expert_bound=0.9) as m:
            m.executor.kill(only_holder(m))
            await until(lambda: m.loop.status().recoveries == 1 and not m.failover.adoption.reconciling)
        assert {layer for layer, _ in m.executor.masked_in_plans} == (set() if policy == "wait" else {1})

    asyncio.run(case())


@pytest.mark.parametrize("policy", ["wait", "mask"])
def test_without_a_shard_requests_wait_and_the_server_is_at_no_moment_ready(policy, monkeypatch):
    monkeypatch.setattr(serving.core.unreadable_experts, "RETRY_S", 0.05)

    async def case() -> None:
        async with served(on_lost_expert=policy) as m:
            m.executor.store.readable = False
            m.executor.kill(only_holder(m))
            await until(lambda: m.loop.status().recoveries == 1)
            steps, ready = m.loop.status().steps, []
            m.executor.fails = lambda number, rank, what: ready.append(m.loop.status().ready)
            await until(lambda: len(ready) > 20)  # messages of plans that ask the store again
            m.executor.fails = lambda number, rank, what: None
            assert not any(ready)
            status = m.loop.status()
            assert status.steps == steps
            assert not status.ready
            assert status.running + status.waiting == len(m.requests)
            told = [event for event in m.loop.events.retained() if event.kind in ("recovered", "store_unreadable")]
            assert [event.kind for event in told] == ["store_unreadable"]
            assert "no step is made without" in told[0].message
            m.executor.store.readable = True
            await until(lambda: m.loop.status().ready)
            await until(lambda: "recovered" in {event.kind for event in m.loop.events.retained()})

    asyncio.run(case())


def test_the_share_of_lost_traffic_is_of_what_routers_choose():
    async def case() -> None:
        async with served() as m:
            loads = m.loop.engine.step_stats.expert_load
            loads[:] = [[100, 100, 100, 100], [10, 20, 30, 40]]
            plan = m.failover.plan
            assert plan is not None
            assert m.failover.adoption.lost_share(with_masked(plan, [(0, 1), (1, 3)])) == pytest.approx(0.4)

    asyncio.run(case())


def test_dense_layers_of_weights_read_in_place_cannot_be_sharded():
    with pytest.raises(InvalidRequest, match="in_place"):
        Settings(dense="sharded", in_place=True)
