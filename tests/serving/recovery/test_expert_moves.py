"""Laws of moving experts: every part of the way is as safe as its ends, and the way ends at the desired plan."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner import solve
from planner.plan.plan import Plan
from planner.solver.balance import host_index
from planner.solver.rebalance import rebalance
from serving.recovery.expert_moves import next_moves
from tests.support.strategies import cases


def spread(plan: Plan) -> np.ndarray:
    """The number of hosts with a copy of each expert, `[moe layers, experts]`."""
    table, hosts = plan.slots_by_rank(), host_index(plan.expert_ranks)
    on = [[len(np.unique(hosts[(layer == e).any(axis=1)])) for e in range(plan.experts)] for layer in table]
    return np.array(on)


@given(cases(), st.integers(1, 6))
def test_no_part_of_a_way_has_fewer_copies_than_both_of_its_ends(case, most):
    first = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    last = rebalance(first, case.loads / case.loads.sum(axis=1, keepdims=True)).plan
    plan, parts = first, 0
    while (part := next_moves(plan, last, most)) is not None:
        part.validate()
        assert (part.copies() >= np.minimum(plan.copies(), last.copies())).all()
        assert (spread(part) >= np.minimum(spread(plan), spread(last))).all()
        assert (part.slot_table() != last.slot_table()).sum() < (plan.slot_table() != last.slot_table()).sum()
        plan, parts = part, parts + 1
    assert plan.slots == last.slots
    assert parts <= (first.slot_table() != last.slot_table()).sum()


@given(cases())
def test_a_part_is_no_larger_than_asked_but_for_what_must_move_together(case):
    first = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    last = rebalance(first, case.loads / case.loads.sum(axis=1, keepdims=True)).plan
    small, large = (next_moves(first, last, most) for most in (1, 10**6))
    if small is not None and large is not None:
        assert large.slots == last.slots
        assert (small.slot_table() != first.slot_table()).sum() <= (large.slot_table() != first.slot_table()).sum()


@given(cases())
def test_an_expert_that_cannot_be_had_does_not_move(case):
    first = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    last = rebalance(first, case.loads / case.loads.sum(axis=1, keepdims=True)).plan
    barred = {(layer, expert) for layer in range(first.moe_layers) for expert in range(first.experts)}
    assert next_moves(first, last, 4, excluding=barred) is None
