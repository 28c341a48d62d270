"""Parity in the loop: what one loss takes comes back without the store, on ranks without processes."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

import serving.core.loop
import serving.core.step_runner
import serving.core.unreadable_experts
import serving.recovery.due
import serving.recovery.expert_parity
import serving.recovery.rendezvous
from planner.solver.parity_groups import expert_sources, host_parity_groups
from serving.config import Settings
from serving.errors import InvalidRequest
from serving.protocol.instructions import Instruction
from serving.recovery.failover import Failover
from simulation.hand_model import PREPARED, alone
from tests.support.fake_executor import FakeCoordinator
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine, at_every_message, lose_one, spoil

BARE = {"parity": 2, "restart": False, "survive": 0, "slots_per_rank": 2}
"""Four experts in six slots of three ranks: two of each layer have no second copy."""


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)
    monkeypatch.setattr(serving.recovery.expert_parity, "PIECE_BYTES", 33)
    monkeypatch.setattr(serving.recovery.expert_parity, "POLL_S", 0.001)
    monkeypatch.setattr(serving.recovery.expert_parity, "RETRY_S", 0.01)
    for module, name in (
        (serving.core.step_runner, "SETTLE_S"),
        (serving.core.loop, "IDLE_S"),
        (serving.recovery.due, "GATHER_S"),
    ):
        monkeypatch.setattr(module, name, 0.005)


@contextlib.asynccontextmanager
async def served(**settings) -> AsyncIterator[Machine]:
    """A server of three ranks with streams on it, and all parity made. Afterwards all streams must have ended right."""
    m = Machine(Settings(**{**vars(SETTINGS), **BARE, **settings}))
    await m.failover.start()
    m.loop.start()
    clients = [asyncio.create_task(m.read(request)) for request in m.requests]
    try:
        await protected(m)
        yield m
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*clients)
        for request in m.requests:
            assert m.tokens[request.id] == alone(request, PREPARED.max_context)[0]
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


async def protected(m: Machine) -> None:
    """Wait until the parity of the plan in force is made, and nothing else is kept."""

    def made() -> bool:
        plan = m.failover.settled_plan
        return plan is not None and set(m.failover.parity.groups) == set(
            host_parity_groups(plan, m.loop.settings.parity)
        )

    await until(made)


async def until(holds) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.001)


async def lose(m: Machine, rank: int) -> None:
    """A rank dies, and the others go on."""
    before = m.loop.status().recoveries
    m.executor.kill(rank)
    await until(lambda: m.loop.status().recoveries > before and not m.failover.adoption.reconciling)


def kinds(m: Machine) -> list[str]:
    return [event.kind for event in m.loop.events.retained()]


@pytest.mark.parametrize("policy", ["wait", "mask"])
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("slots", [2, 3])
def test_without_a_store_no_single_loss_masks_an_expert(victim, policy, slots):
    async def case() -> None:
        async with served(on_lost_expert=policy, slots_per_rank=slots) as m:
            lost = {(g.layer, e) for g in m.failover.parity.groups for e in g.members}
            held = m.failover.plan.slots_of(victim)
            lost = {(layer, expert) for layer, expert in lost if expert in held[layer]}
            m.executor.store.readable = False
            await lose(m, victim)
            assert m.failover.plan.masked == ()
            assert m.loop.status().experts_rebuilt == len(lost)
            assert ("rebuilt" in kinds(m)) == bool(lost)

    asyncio.run(case())


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (2, 0)])
def test_nor_does_the_next_loss_once_parity_is_made_again(first, second):
    async def case() -> None:
        async with served() as m:
            m.executor.store.readable = False
            await lose(m, first)
            await protected(m)
            await lose(m, second)
            assert m.failover.plan.masked == ()
            assert m.failover.plan_ranks == (3 - first - second,)

    asyncio.run(case())


@pytest.mark.parametrize("policy", ["wait", "mask"])
def test_an_expert_that_another_rank_is_to_have_is_moved_there_and_never_masked(policy):
    async def case() -> None:
        async with served(ranks=6, slots_per_rank=1, lattice_depth=2, on_lost_expert=policy) as m:
            failover = m.failover
            first, second, moved = next(found for found in moves(failover) if found[2])
            m.executor.store.readable = False
            await lose(m, first)
            await protected(m)
            m.executor.kill(second)
            await until(lambda: second not in failover.plan_ranks)
            assert moved.isdisjoint(failover.plan.masked)
            await until(lambda: m.loop.status().recoveries == 2 and failover.settled_plan is not None)
            assert failover.plan.masked == ()
            assert failover.parity.moved == len(moved)

    asyncio.run(case())


def moves(failover: Failover) -> Iterator[tuple[int, int, set[tuple[int, int]]]]:
    """Two ranks, one lost after the other, and the (MoE layer, expert) that the second loss moves among the others."""
    ranks = set(failover.plans.base.rank_ids)
    for first, second in itertools.permutations(ranks, 2):
        now, then = failover.plans.of(ranks - {first}), failover.plans.of(ranks - {first, second})
        yield first, second, {at for at, way in expert_sources((), now, then).items() if way.group is None}


def test_two_losses_at_once_leave_to_the_store_what_they_took_two_of():
    async def case(store: bool) -> Machine:
        async with served() as m:
            m.executor.store.readable = store
            m.executor.kill(0)
            m.executor.kill(1)
            await until(lambda: m.loop.status().recoveries > 0 and not m.failover.adoption.reconciling)
            assert m.failover.plan_ranks == (2,)
            assert "ready" in kinds(m)
            return m

    with_store, without = asyncio.run(case(True)), asyncio.run(case(False))
    assert with_store.failover.plan.masked == ()
    assert with_store.failover.adoption.experts_loaded > 0
    assert without.failover.plan.masked != ()
    assert "store_unreadable" in kinds(without)


def test_parity_that_gives_other_weights_is_refused_and_the_store_asked():
    async def case() -> None:
        async with served() as m:
            loaded = m.failover.adoption.experts_loaded
            for rank in (0, 1, 2):
                for whole in m.executor.get(rank).parity.values():
                    whole[50] ^= 1
            await lose(m, 1)
            assert m.failover.plan.masked == ()
            assert m.failover.parity.rebuilt == 0
            assert m.failover.adoption.experts_loaded > loaded
            assert "rebuild_failed" in kinds(m)
            await protected(m)

    asyncio.run(case())


def test_where_neither_parity_nor_the_store_is_right_experts_are_masked_and_nobody_tries_for_ever():
    async def case() -> None:
        async with served(on_lost_expert="mask") as m:
            for rank in (0, 1, 2):
                for whole in m.executor.get(rank).parity.values():
                    whole[50] ^= 1
            m.executor.store.readable = False
            await lose(m, 1)
            assert m.failover.plan.masked != ()
            assert {"rebuild_failed", "store_unreadable"} <= {*kinds(m)}
            assert kinds(m).count("rebuild_failed") == len(m.failover.plan.masked)

    asyncio.run(case())


def test_a_replacement_that_the_store_gives_nothing_is_given_experts_by_the_others(monkeypatch):
    monkeypatch.setattr(serving.core.unreadable_experts, "RETRY_S", 1000.0)

    async def case() -> None:
        async with served() as m:
            await lose(m, 2)
            await protected(m)
            m.executor.store.readable = False
            await m.loop.apply(Instruction(action="scale_up", ranks=(2,)))
            await until(lambda: set(m.failover.plan_ranks) == {0, 1, 2} and not m.failover.plan.masked)
            assert "store_unreadable" in kinds(m)

    asyncio.run(case())


def test_a_damaged_expert_is_made_again_and_makes_no_parity_itself():
    async def case() -> None:
        async with served() as m:
            group = m.failover.parity.groups[0]
            (rank, slot) = next(
                (rank, slot)
                for rank in m.failover.plan_ranks
                for slot, expert in enumerate(m.failover.plan.slots_of(rank)[group.layer])
                if expert == group.members[0]
            )
            m.executor.store.readable = False
            m.executor.damaged.add((rank, group.layer, slot))
            await m.loop.engine.maintenance.repair.inspect_next(0)
            await until(lambda: m.loop.engine.maintenance.repair.experts_restored == 1)
            assert m.failover.parity.rebuilt == 1
            assert m.failover.plan.masked == ()

    asyncio.run(case())


def test_ranks_keep_what_the_plan_asks_for_and_nothing_else():
    async def case() -> None:
        async with served(restart=True) as m:
            m.executor.kill(2)
            await until(lambda: set(m.failover.plan_ranks) == {0, 1})
            await until(lambda: set(m.failover.plan_ranks) == {0, 1, 2})
            await protected(m)
            groups = m.failover.parity.groups
            kept = {rank: {(g.layer, g.members) for g in groups if g.rank == rank} for rank in m.failover.plan_ranks}
            await until(lambda: all(m.executor.get(rank).parity.keys() == keys for rank, keys in kept.items()))
            status = m.loop.status()
            assert status.parity_groups == status.parity_wanted > 0
            assert status.parity_bytes == 100 * status.parity_groups

    asyncio.run(case())


@pytest.mark.parametrize(
    ("act", "policy"),
    [
        (lose_one, "wait"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((lose_one, "mask"), (spoil, "wait"), (spoil, "mask"))
        ),
    ],
)
def test_a_failure_at_any_message_changes_no_token(act, policy):
    settings = {**BARE, "restart": True, "on_lost_expert": policy, "kv_replication": "off"}
    at_every_message(act, settings, every=4)


@pytest.mark.parametrize("parity", [-1, 3])
def test_a_group_that_has_no_rank_left_for_its_parity_is_refused(parity):
    with pytest.raises(InvalidRequest, match="Choose 0 to 2"):
        Settings(ranks=3, parity=parity)
