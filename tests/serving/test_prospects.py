"""What-if: what the loss of each rank and host would cost, from the planner and what runs."""

import dataclasses

import pytest

from planner.cluster import Cluster
from planner.deployment import Deployment
from planner.solve import solve
from planner.workload import Workload
from serving.prospects import prospects, traffic_now
from serving.sequence import Sequence
from tests.fakes import small_request

WORKLOAD = Workload(
    name="small",
    layers=4,
    moe_layers=2,
    experts=8,
    experts_per_token=2,
    expert_bytes=1 << 20,
    rest_bytes=8 << 20,
    cache_bytes_per_token=1 << 12,
    page_tokens=32,
    hidden_bytes=1 << 10,
    weight_format="float32",
)


def deployment(ranks: int, *, hosts: list[str] | None = None, slots: int | None = None, loads=()) -> Deployment:
    cluster = Cluster.local(ranks, hosts=hosts)
    plan = solve(WORKLOAD, cluster, slots_per_rank=slots, pages_per_rank=64)
    return Deployment(plan=plan, workload=WORKLOAD, cluster=cluster, traffic=traffic_now((), 2048), loads=loads)


def running(rank: int, computed: int, name: str) -> Sequence:
    return Sequence(small_request(name, range(1, 50)), 0, rank=rank, computed=computed, pages=(0, 1))


def test_each_rank_is_told_with_the_requests_and_tokens_that_run_on_it():
    here = [running(0, 40, "a"), running(2, 17, "b"), running(2, 5, "c")]
    told = prospects(deployment(4), None, lambda dead: True, here)
    assert [(p.kind, p.name) for p in told] == [("rank", str(r)) for r in range(4)] + [("host", "localhost")]
    assert [p.requests_moved for p in told] == [1, 0, 2, 0, 3]
    assert [p.tokens_recomputed for p in told] == [40, 0, 22, 0, 62]


def test_the_loss_of_a_rank_moves_the_requests_of_its_tensor_group():
    here = [running(0, 40, "a"), running(1, 17, "b"), running(2, 5, "c")]
    d = deployment(4)
    grouped = dataclasses.replace(d, plan=solve(WORKLOAD, d.cluster, pages_per_rank=64, tensor=2))
    told = prospects(grouped, None, lambda dead: True, here)
    assert [p.requests_moved for p in told] == [2, 2, 1, 1, 3]
    alone = dataclasses.replace(d, plan=solve(WORKLOAD, d.cluster, alive=[0, 1], pages_per_rank=64, tensor=2))
    for each in prospects(alone, None, lambda dead: True, here):
        assert not each.survivable, "the server does not make groups narrower"
        assert "no rank is left that attends" in each.reason


def test_ranks_that_attend_to_nothing_are_counted_on_for_the_next_group():
    d = deployment(4)
    base = solve(WORKLOAD, d.cluster, pages_per_rank=64, tensor=2)
    three = dataclasses.replace(d, plan=solve(WORKLOAD, d.cluster, alive=[1, 2, 3], previous=base))
    assert [r.role for r in three.plan.ranks] == ["expert", "collocated", "collocated"]
    assert all(each.survivable for each in prospects(three, None, lambda dead: True, ())[:3])


def test_what_is_protected_is_not_computed_again_and_its_streams_wait_less():
    here = [running(0, 40, "a"), running(2, 17, "b")]
    told, bare = (prospects(deployment(4), None, lambda dead: True, here, protected=p)[0] for p in (True, False))
    assert (told.requests_moved, told.tokens_recomputed) == (1, 0)
    assert told.stall_ms == bare.stall_ms <= told.moved_stall_ms < bare.moved_stall_ms


def test_the_loss_of_everybody_is_not_survivable_and_says_why():
    whole = prospects(deployment(2), None, lambda dead: True, ())[-1]
    assert not whole.survivable
    assert whole.reason
    assert not whole.prepared


def test_a_host_of_several_ranks_is_one_loss_and_a_host_of_one_is_not_told_twice():
    told = prospects(deployment(3, hosts=["a", "a", "b"]), None, lambda dead: len(dead) == 1, ())
    assert [(p.kind, p.name, p.ranks) for p in told][3:] == [("host", "a", (0, 1))]
    assert [p.prepared for p in told] == [True, True, True, False]


def test_experts_without_another_copy_are_loaded_and_their_traffic_counted():
    loads = tuple(tuple(float(e + 1) for e in range(8)) for _ in range(2))
    tight = prospects(deployment(2, slots=4, loads=loads), None, lambda dead: True, ())
    assert not any(p.survivable and p.experts_loaded == 0 for p in tight[:2])
    assert sum(p.traffic_lost for p in tight[:2]) == pytest.approx(1.0)
    ample = prospects(deployment(2, slots=8), None, lambda dead: True, ())
    assert [p.experts_loaded for p in ample[:2]] == [0, 0]
    assert [p.traffic_lost for p in ample[:2]] == [0.0, 0.0]
