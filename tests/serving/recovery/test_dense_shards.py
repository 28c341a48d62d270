"""Shards of divided dense layers: a step that lacks one would be wrong, so none is made, whatever the policy."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest

import serving.loop
from serving.config import Settings
from serving.errors import InvalidRequest
from tests.fakes import alone
from tests.serving.test_recovery_machine import LIMIT_S, MODEL, SETTINGS, Machine

DIVIDED = dataclasses.replace(MODEL, divided_layers=(0,))
BARE = {"restart": False, "survive": 0, "slots_per_rank": 2, "protect_cache": "off"}
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
            assert m.tokens[request.id] == alone(request, MODEL.max_context)[0]
        assert {layer for layer, _ in m.links.masked_in_steps}.isdisjoint(DIVIDED.divided_layers)
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
    return next(r for r in plan.holder_ids if all(once[i, plan.slots_of(r)[i]].any() for i in range(plan.moe_layers)))


@pytest.mark.parametrize("policy", ["wait", "mask", "auto"])
def test_experts_are_masked_by_policy_and_shards_never(policy):
    async def case() -> None:
        async with served(on_lost_expert=policy, lost_expert_bound=0.9) as m:
            m.links.kill(only_holder(m))
            await until(lambda: m.loop.status().recoveries == 1 and not m.failover.healing)
        assert {layer for layer, _ in m.links.masked_in_plans} == (set() if policy == "wait" else {1})

    asyncio.run(case())


@pytest.mark.parametrize("policy", ["wait", "mask"])
def test_without_a_shard_requests_wait_and_nobody_is_told_it_is_ready(policy, monkeypatch):
    monkeypatch.setattr(serving.loop, "UNREADABLE_S", 0.05)

    async def case() -> None:
        async with served(on_lost_expert=policy) as m:
            m.links.store = False
            m.links.kill(only_holder(m))
            await until(lambda: m.loop.status().recoveries == 1)
            steps = m.loop.status().steps
            await asyncio.sleep(0.1)
            status = m.loop.status()
            assert status.steps == steps
            assert not status.ready
            assert status.running + status.waiting == len(m.requests)
            told = [event for event in m.loop.events.past() if event.kind in ("recovered", "store_unreadable")]
            assert [event.kind for event in told] == ["store_unreadable"]
            assert "no step is made without" in told[0].message
            m.links.store = True
            await until(lambda: m.loop.status().ready)
            await until(lambda: "recovered" in {event.kind for event in m.loop.events.past()})

    asyncio.run(case())


def test_the_share_of_lost_traffic_is_of_what_routers_choose():
    async def case() -> None:
        async with served() as m:
            loads = m.loop.tally.expert_load
            loads[:] = [[100, 100, 100, 100], [10, 20, 30, 40]]
            plan = m.failover.plan
            assert plan is not None
            assert m.failover.lost_share(plan.with_masked([(0, 1), (1, 3)])) == pytest.approx(0.4)

    asyncio.run(case())


def test_weights_read_in_place_cannot_be_divided():
    with pytest.raises(InvalidRequest, match="in_place"):
        Settings(dense="divided", in_place=True)
