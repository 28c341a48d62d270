"""Loss forecasts: the planner's price of losing a rank or a host, from this server's own recoveries and requests."""

import dataclasses

import numpy as np
import pytest

from planner import solve
from planner.cost.front import FrontCost
from planner.inputs.cluster import Cluster
from planner.inputs.recovery_times import RecoveryTimes
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment
from serving.engine.sequence import Sequence
from serving.protocol.events import Event
from serving.recovery.loss_forecast import current_traffic, loss_costs, loss_forecasts, measured_recovery
from simulation.hand_model import small_request

WORKLOAD = Workload(
    name="m",
    layers=4,
    moe_layers=2,
    experts=8,
    experts_per_token=2,
    expert_bytes=1 << 20,
    rest_bytes=1 << 24,
    cache_bytes_per_token=1024,
    page_tokens=16,
    hidden_bytes=512,
    weight_format="float32",
)
CLUSTER = Cluster.local(4)
SMALL = Workload(
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


def event(kind: str, **phases: float) -> Event:
    return Event(sequence=1, time=0.0, kind=kind, epoch=1, phases=phases)


def test_phases_are_medians_of_recoveries_on_prepared_meshes():
    events = [
        event("recovered", detect=10.0, fence=1.0, plan=1.0, adopt=30.0, resume=20.0),
        event("recovered", detect=30.0, fence=3.0, plan=1.0, adopt=50.0, resume=20.0),
        event("recovered", detect=20.0, fence=2.0, plan=1.0, adopt=40.0, resume=20.0),
        event("recovered", detect=999.0, join=999.0),
        event("rejoined", join=999.0),
    ]
    found = measured_recovery(events, 3)
    assert (found.detect, found.abort, found.adopt, found.first_step) == pytest.approx((0.020, 0.003, 0.040, 0.020))
    assert (found.source, found.ranks) == ("measured", 3)
    assert measured_recovery([], 3) == RecoveryTimes()


def test_measured_phases_are_taken_as_they_are_on_as_many_ranks_and_grow_with_messages_beyond():
    events = [event("recovered", detect=10.0, fence=1.0, plan=1.0, adopt=30.0, resume=20.0)]
    found = measured_recovery(events, 3)
    (forecast, *_) = loss_forecasts(deployment(4, slots=8), found, lambda dead: True, ())
    assert forecast.stall_ms == pytest.approx(62.0)
    (more, *_) = loss_forecasts(deployment(12, slots=8), found, lambda dead: True, ())
    front = FrontCost.measured(SMALL).unwatched()
    messages = front.abort.at(11) + front.adopt.at(11) - front.abort.at(3) - front.adopt.at(3)
    assert more.stall_ms == pytest.approx(62.0 + 1e3 * messages)


@pytest.mark.parametrize("alive", [(0, 1, 2, 3), (0, 2, 3), (1,)])
def test_every_rank_has_a_price_whoever_is_left(alive):
    base = solve(WORKLOAD, CLUSTER, survive_ranks=1, pages_per_rank=8)
    plan = base if len(alive) == 4 else solve(WORKLOAD, CLUSTER, alive=alive, previous=base)
    costs = loss_costs(plan, WORKLOAD, CLUSTER, np.ones((2, 8), np.int64), RecoveryTimes(), prepared=alive[:1])
    assert tuple(costs) == alive
    assert [c.prepared for c in costs.values()] == [r == alive[0] and len(alive) > 1 for r in alive]
    assert all(cost.survivable == (len(alive) > 1) for cost in costs.values())


def test_experts_with_one_copy_are_counted_and_weighed_by_their_traffic():
    plan = solve(WORKLOAD, CLUSTER, slots_per_rank=3, survive_ranks=1, pages_per_rank=8)
    table = plan.slots_by_rank()
    load = np.ones((2, 8), np.int64)
    load[:, table[0, 1, 0]] = 100
    costs = loss_costs(plan, WORKLOAD, CLUSTER, load, RecoveryTimes(), ())
    copies = plan.copies()
    for position, rank in enumerate(plan.rank_ids):
        only = [(l, e) for l in range(2) for e in set(table[l, position].tolist()) - {-1} if copies[l, e] == 1]
        assert costs[rank].experts_to_load == len(only)
        share = sum(load[l, e] / load[l].sum() for l, e in only) / 2
        assert costs[rank].traffic == pytest.approx(share)


def deployment(ranks: int, *, hosts: list[str] | None = None, slots: int | None = None, loads=()) -> Deployment:
    cluster = Cluster.local(ranks, hosts=hosts)
    plan = solve(SMALL, cluster, slots_per_rank=slots, pages_per_rank=64)
    return Deployment(plan=plan, workload=SMALL, cluster=cluster, traffic=current_traffic((), 2048), loads=loads)


def running(rank: int, computed: int, name: str) -> Sequence:
    return Sequence(small_request(name, range(1, 50)), 0, rank=rank, computed=computed, pages=(0, 1))


def test_a_forecast_counts_the_requests_and_tokens_on_the_rank():
    sequences = [running(0, 40, "a"), running(2, 17, "b"), running(2, 5, "c")]
    forecasts = loss_forecasts(deployment(4), None, lambda dead: True, sequences)
    assert [(p.kind, p.name) for p in forecasts] == [("rank", str(r)) for r in range(4)] + [("host", "localhost")]
    assert [p.requests_moved for p in forecasts] == [1, 0, 2, 0, 3]
    assert [p.tokens_recomputed for p in forecasts] == [40, 0, 22, 0, 62]


def test_the_loss_of_a_rank_moves_the_requests_of_its_tensor_group():
    sequences = [running(0, 40, "a"), running(1, 17, "b"), running(2, 5, "c")]
    d = deployment(4)
    grouped = dataclasses.replace(d, plan=solve(SMALL, d.cluster, pages_per_rank=64, tensor=2))
    forecasts = loss_forecasts(grouped, None, lambda dead: True, sequences)
    assert [p.requests_moved for p in forecasts] == [2, 2, 1, 1, 3]
    alone = dataclasses.replace(d, plan=solve(SMALL, d.cluster, alive=[0, 1], pages_per_rank=64, tensor=2))
    for each in loss_forecasts(alone, None, lambda dead: True, sequences):
        assert not each.survivable, "the server does not make groups narrower"
        assert "no rank is left that attends" in each.reason


def test_idle_ranks_are_counted_on_for_the_next_tensor_group():
    d = deployment(4)
    base = solve(SMALL, d.cluster, pages_per_rank=64, tensor=2)
    three = dataclasses.replace(d, plan=solve(SMALL, d.cluster, alive=[1, 2, 3], previous=base))
    assert [r.role for r in three.plan.ranks] == ["expert", "collocated", "collocated"]
    assert all(each.survivable for each in loss_forecasts(three, None, lambda dead: True, ())[:3])


def test_with_kv_replicas_no_tokens_are_computed_again_and_streams_wait_less():
    sequences = [running(0, 40, "a"), running(2, 17, "b")]
    forecasts, recomputing = (
        loss_forecasts(deployment(4), None, lambda dead: True, sequences, protected=p)[0] for p in (True, False)
    )
    assert (forecasts.requests_moved, forecasts.tokens_recomputed) == (1, 0)
    assert forecasts.stall_ms == recomputing.stall_ms <= forecasts.moved_stall_ms < recomputing.moved_stall_ms


def test_the_loss_of_all_ranks_is_not_survivable_and_says_why():
    whole = loss_forecasts(deployment(2), None, lambda dead: True, ())[-1]
    assert not whole.survivable
    assert whole.reason
    assert not whole.prepared


def test_a_host_of_several_ranks_is_one_loss_and_a_host_of_one_is_not_forecast_twice():
    forecasts = loss_forecasts(deployment(3, hosts=["a", "a", "b"]), None, lambda dead: len(dead) == 1, ())
    assert [(p.kind, p.name, p.ranks) for p in forecasts][3:] == [("host", "a", (0, 1))]
    assert [p.prepared for p in forecasts] == [True, True, True, False]


def test_experts_without_another_copy_are_loaded_and_their_traffic_counted():
    loads = tuple(tuple(float(e + 1) for e in range(8)) for _ in range(2))
    tight = loss_forecasts(deployment(2, slots=4, loads=loads), None, lambda dead: True, ())
    assert not any(p.survivable and p.experts_loaded == 0 for p in tight[:2])
    assert sum(p.traffic_lost for p in tight[:2]) == pytest.approx(1.0)
    ample = loss_forecasts(deployment(2, slots=8), None, lambda dead: True, ())
    assert [p.experts_loaded for p in ample[:2]] == [0, 0]
    assert [p.traffic_lost for p in ample[:2]] == [0.0, 0.0]


def test_a_forecast_has_its_range_and_measuring_makes_it_narrower():
    widths = []
    for recovery in (None, RecoveryTimes(source="measured", first_step=0.1, ranks=3)):
        (forecast, *_) = loss_forecasts(deployment(4), recovery, lambda dead: True, ())
        assert 0 < forecast.stall_low_ms < forecast.stall_ms < forecast.stall_high_ms
        assert forecast.moved_stall_low_ms <= forecast.moved_stall_ms <= forecast.moved_stall_high_ms
        assert forecast.capacity_low <= forecast.capacity <= forecast.capacity_high
        assert ("measured" if recovery else "estimated") in forecast.range_source
        widths.append(forecast.stall_high_ms / forecast.stall_low_ms)
    assert widths[1] < widths[0]
