"""The planner's forecast of a loss, from the running server's own plan file, is what the server then does."""

import re

import numpy as np
import pytest

from planner import Plan, solve
from planner.failures.loss_model import LossModel, LossOutcome
from planner.plan.deployment import Deployment
from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.streams import Traffic, events_since, kill, last_event, wait_until, wait_until_whole


def exported(client: Client) -> Deployment:
    """The plan in force, as `moejax status --plan` prints it."""
    return Deployment.from_json(client.plan())


def foreseen(deployment: Deployment, dead: set[int]) -> tuple[LossOutcome, Plan]:
    """The forecast of `moejax plan degrade` for a loss, and the plan after it."""
    alive = [rank for rank in deployment.plan.rank_ids if rank not in dead]
    after = solve(deployment.workload, deployment.cluster, alive=alive, previous=deployment.plan)
    return LossModel(deployment).outcome(dead), after


def settled_without(client: Client, dead: set[int]) -> Plan:
    """The plan that the survivors have come to, every expert loaded."""
    found: list[Plan] = []

    def settled() -> bool:
        plan = exported(client).plan
        found.append(plan)
        return not dead.intersection(plan.rank_ids) and not plan.masked and int(plan.slot_table().min()) >= 0

    wait_until(settled, f"a whole plan without {sorted(dead)}")
    return found[-1]


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_slots_and_means_after_a_rank_is_killed_are_as_predicted(whole: Client, traffic: Traffic, rank: int) -> None:
    deployment, loaded = exported(whole), whole.status().experts_loaded
    outcome, plan = foreseen(deployment, {rank})
    assert outcome.survivable
    assert outcome.means["copy"] + outcome.means.get("store", 0) == len(np.unique(_pairs(deployment.plan, rank)))
    after: list[Plan] = []
    read: list[int] = []

    def settle() -> None:
        after.append(settled_without(whole, {rank}))
        read.append(whole.status().experts_loaded - loaded)

    sequence = last_event(whole)
    traffic.during(whole, kill(whole, rank), settle)
    assert {"rank_lost", "recovered"} <= {event.kind for event in events_since(whole, sequence)}
    assert after[0].rank_ids == plan.rank_ids
    assert after[0].slots == plan.slots
    assert after[0].masked == plan.masked == ()
    assert read == [outcome.means.get("store", 0)]
    wait_until_whole(whole)
    assert whole.status().compiles_after_ready == 0


def test_masked_experts_and_a_lost_host_are_as_predicted() -> None:
    settings = {"hosts": 2, "slots_per_rank": 4, "on_lost_expert": "mask", "restart": False}
    settings |= {"lattice_depth": 1, "buckets": FEW_BUCKETS}
    with Server(model=str(TINY), ranks=4, chaos=True, **settings) as server, Client(server) as client:
        wait_until_whole(client)
        client.generate("ROMEO:", max_tokens=8, ignore_eos=True)
        deployment, before = exported(client), last_event(client)
        assert [r.host for r in deployment.plan.ranks] == ["host0", "host0", "host1", "host1"]
        dead = {2, 3}
        outcome, plan = foreseen(deployment, dead)
        client.kill(0, host="host1")
        after = settled_without(client, dead)
        assert after.slots == plan.slots
        masked = [event.message for event in events_since(client, before) if event.kind == "masked"]
        told = int(re.match(r"(\d+) experts", masked[0])[1]) if masked else 0
        assert told == outcome.means.get("store", 0)


def test_the_roles_after_a_lost_expert_rank_are_as_predicted() -> None:
    settings = {"arch": "disaggregated", "attention": 2, "experts": 2, "slots_per_rank": 4, "restart": False}
    settings |= {"lattice_depth": 1, "buckets": FEW_BUCKETS}
    with Server(model=str(TINY), ranks=4, chaos=True, **settings) as server, Client(server) as client:
        wait_until_whole(client)
        known = Traffic.record(client, streams=2, prompt_tokens=20, max_tokens=30)
        deployment = exported(client)
        assert [r.role for r in deployment.plan.ranks] == ["attention", "attention", "expert", "expert"]
        outcome, plan = foreseen(deployment, {3})
        assert outcome.means["switch"] == 1  # 8 experts do not fit in the 4 slots that are left
        after: list[Plan] = []
        known.during(client, kill(client, 3), lambda: after.append(settled_without(client, {3})))
        assert [(r.id, r.role) for r in after[0].ranks] == [(r.id, r.role) for r in plan.ranks]
        assert after[0].slots == plan.slots


def _pairs(plan: Plan, rank: int) -> np.ndarray:
    """(layer, expert) pairs that a rank holds, as numbers."""
    slots = plan.slots_of(rank)
    return (np.arange(len(slots))[:, None] * plan.experts + slots).ravel()
