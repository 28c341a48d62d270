"""What the loss of a rank costs: the planner's price with this server's own phases."""

import numpy as np
import pytest

from planner.cluster import Cluster
from planner.recovery import Recovery
from planner.solve import solve
from planner.workload import Workload
from serving.outlook import loss_costs, measured
from serving.status import Event

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
    found = measured(events)
    assert (found.detect, found.abort, found.adopt) == pytest.approx((0.020, 0.003, 0.060))
    assert found.source == "measured"
    assert measured([]) == Recovery()


@pytest.mark.parametrize("alive", [(0, 1, 2, 3), (0, 2, 3), (1,)])
def test_every_rank_has_a_price_whoever_is_left(alive):
    base = solve(WORKLOAD, CLUSTER, survive_ranks=1, pages_per_rank=8)
    plan = base if len(alive) == 4 else solve(WORKLOAD, CLUSTER, alive=alive, previous=base)
    costs = loss_costs(plan, WORKLOAD, CLUSTER, np.ones((2, 8), np.int64), Recovery(), prepared=alive[:1])
    assert tuple(costs) == alive
    assert [c.prepared for c in costs.values()] == [r == alive[0] and len(alive) > 1 for r in alive]
    assert all(cost.survivable == (len(alive) > 1) for cost in costs.values())


def test_experts_with_one_copy_are_counted_and_weighed_by_their_traffic():
    plan = solve(WORKLOAD, CLUSTER, slots_per_rank=3, survive_ranks=1, pages_per_rank=8)
    table = plan.slot_table().reshape(2, 4, 3)
    load = np.ones((2, 8), np.int64)
    load[:, table[0, 1, 0]] = 100
    costs = loss_costs(plan, WORKLOAD, CLUSTER, load, Recovery(), ())
    copies = plan.copies()
    for position, rank in enumerate(plan.rank_ids):
        only = [(l, e) for l in range(2) for e in set(table[l, position].tolist()) - {-1} if copies[l, e] == 1]
        assert costs[rank].experts_to_load == len(only)
        share = sum(load[l, e] / load[l].sum() for l, e in only) / 2
        assert costs[rank].traffic == pytest.approx(share)
