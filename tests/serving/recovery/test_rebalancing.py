"""When experts move by the load: on demand, or when one rank stays hot; never to a placement that survives less."""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest

import serving.recovery.rebalancing
from planner.plan.plan import Plan
from serving.errors import NoCapacity
from serving.protocol.events import EventLog
from serving.recovery.plan_catalog import PlanCatalog, hottest_share
from serving.recovery.rebalancing import Rebalancing
from tests.serving.recovery.test_plan_catalog import plans
from tests.support.recovery_machine import play, rebalance


def skewed(catalog: PlanCatalog, tokens: int = 100_000) -> np.ndarray:
    """A load of which the experts of one rank have most."""
    load = np.ones((catalog.base.moe_layers, catalog.base.experts))
    for layer, slots in zip(load, catalog.base.slots_of(0), strict=True):
        layer[slots[slots >= 0]] = 10
    return tokens * load / load.sum()


def test_the_new_plans_are_cooler_and_survive_every_loss_that_the_old_ones_did() -> None:
    catalog = plans(lattice_depth=2)
    load = skewed(catalog)
    moved = catalog.rebalanced(load)
    assert moved.after < moved.before == hottest_share(catalog.base, load)
    assert moved.moved > 0
    old = [catalog.of(alive).slots for alive in ([0, 1, 2, 3], [0, 1, 2], [1, 3])]
    catalog.adopt(moved)
    assert hottest_share(catalog.of([0, 1, 2, 3]), load) == moved.after
    assert [catalog.of(alive).slots for alive in ([0, 1, 2, 3], [0, 1, 2], [1, 3])] != old
    assert catalog.of([1, 3]).masked == ()


def test_copies_that_are_to_survive_two_losses_are_not_given_to_another_expert() -> None:
    load = np.ones((2, 4))
    load[:, 0] = 100
    assert plans(survive=2, slots_per_rank=3).rebalanced(load).moved == 0
    assert plans(survive=1, slots_per_rank=3).rebalanced(load).moved > 0


def test_the_next_front_keeps_the_placement_of_its_own_ranks_and_no_other() -> None:
    catalog, other = plans(), plans(survive=2)
    catalog.adopt(catalog.rebalanced(skewed(catalog)))
    file, fresh = catalog.base.to_json(), plans()
    assert fresh.place(Plan.from_json(file))
    assert fresh.of([0, 1, 2]).slots == catalog.of([0, 1, 2]).slots
    assert not other.place(Plan.from_json(file)) or other.base.slots_per_rank == catalog.base.slots_per_rank
    assert not fresh.place(dataclasses.replace(catalog.base, experts=catalog.base.experts + 1))


@pytest.mark.usefixtures("no_processes")
def test_experts_move_in_parts_beside_the_steps_and_no_token_changes() -> None:
    messages = asyncio.run(play(rebalance, None, 0, {"on_lost_expert": "wait", "kv_replication": "off"}))
    adopted = [number for number, (_, what, *_) in enumerate(messages) if what == "adopt"]
    assert adopted
    assert not {"join", "connect", "compile", "prepare"}.intersection(what for _, what, *_ in messages)


class Server:
    """The parts of a server that rebalancing uses; its steps adopt at once what is planned."""

    def __init__(self, catalog: PlanCatalog) -> None:
        self.events = EventLog()
        self.failover = self
        self.plans = catalog
        self.plan = catalog.base
        self.epoch = 0
        self.adoption = self
        self.reconciling = False
        self.reaches = lambda desired: desired
        """The plan that the steps come to."""

    @property
    def plan_ranks(self) -> tuple[int, ...]:
        return self.plan.rank_ids

    def converge_to(self, desired: Plan) -> None:
        self.plan = self.reaches(desired)

    def wake(self) -> None:
        asyncio.get_running_loop().call_soon(self.between_steps)

    def between_steps(self) -> None:
        self.rebalancing.begin()
        self.rebalancing.look()

    def use(self, rebalancing: Rebalancing) -> Rebalancing:
        self.rebalancing = rebalancing
        return rebalancing

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events._events]


def test_a_rank_that_stays_hot_is_relieved_once_and_a_burst_moves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(serving.recovery.rebalancing, "POLL_S", 0.001)

    async def case() -> None:
        server = Server(plans())
        total = np.zeros((server.plan.moe_layers, server.plan.experts))
        hot, even = skewed(server.plans), np.full_like(total, 100_000 / total.shape[1])
        pauses = iter((hot, even, hot, even, hot, hot, hot * 0, even, even))

        async def sleep(seconds: float) -> None:
            if seconds != 60.0:
                await asyncio.tasks.sleep(0)
                return
            load = next(pauses, None)
            if load is None:
                raise asyncio.CancelledError
            total[...] += load

        file = tmp_path / "placement.json"
        rebalancing = server.use(Rebalancing(server, lambda: total, file))  # type: ignore[arg-type]
        before = server.plan
        monkeypatch.setattr(asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await rebalancing.watch(1.2, 60.0)
        assert server.kinds() == ["rebalanced"]
        assert hottest_share(server.plan, hot) < hottest_share(before, hot)
        assert Plan.from_json(file.read_text()).slots == server.plan.slots

    asyncio.run(case())


def test_while_a_rank_is_missing_nothing_moves() -> None:
    async def case() -> None:
        server = Server(plans())
        rebalancing = server.use(Rebalancing(server, lambda: skewed(server.plans)))  # type: ignore[arg-type]
        server.plan = server.plans.of([0, 1, 3])
        with pytest.raises(NoCapacity, match=r"\[2\] do not"):
            await rebalancing.run()
        assert not rebalancing.pending

    asyncio.run(case())


def test_a_rank_that_leaves_while_the_placement_is_computed_moves_nothing() -> None:
    async def case() -> None:
        server = Server(plans())
        rebalancing = server.use(Rebalancing(server, lambda: skewed(server.plans)))  # type: ignore[arg-type]
        base, moving = server.plan, asyncio.create_task(rebalancing.run())
        await asyncio.sleep(0)
        assert rebalancing._busy
        # The slots of other ranks in one row may read like those of all ranks.
        server.plan = dataclasses.replace(base, ranks=base.ranks[:2], slots_per_rank=2 * base.slots_per_rank)
        with pytest.raises(NoCapacity, match="have changed"):
            await moving
        assert server.kinds() == ["rebalance_failed"]
        assert server.plans.base is base

    asyncio.run(case())


def test_a_placement_that_cannot_be_written_moves_nothing(tmp_path: Path) -> None:
    async def case() -> None:
        server = Server(plans())
        (tmp_path / "file").write_text("a file where the folder should be")
        rebalancing = server.use(
            Rebalancing(server, lambda: skewed(server.plans), tmp_path / "file" / "placement.json")  # type: ignore[arg-type]
        )
        base = server.plan
        with pytest.raises(NoCapacity, match="cannot be written"):
            await rebalancing.run()
        assert server.plan is server.plans.base is base
        assert server.kinds() == ["rebalance_failed"]

    asyncio.run(case())


@pytest.mark.parametrize("lost", [True, False], ids=["a rank is lost", "an expert cannot be read"])
def test_a_move_that_cannot_end_is_given_up_and_the_next_one_is_not_refused(lost: bool) -> None:
    async def case() -> None:
        server = Server(plans())
        rebalancing = server.use(Rebalancing(server, lambda: skewed(server.plans)))  # type: ignore[arg-type]
        before = server.plan
        server.reaches = lambda desired: server.plans.of([0, 1, 3]) if lost else before
        with pytest.raises(NoCapacity, match="are back" if lost else "cannot be read"):
            await rebalancing.run()
        assert not rebalancing.moving
        server.plan = server.plans.base
        server.reaches = lambda desired: desired
        await rebalancing.run()
        assert server.kinds() == ["rebalance_failed", "rebalanced"]

    asyncio.run(case())
