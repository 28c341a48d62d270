"""Laws of diff and rebalance: rounds are legal, nothing moves without need, the hottest rank gets cooler."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import Hardware, InputError, moves, solve
from planner.plan.transfer import transfer
from planner.solver.balance import host_index, peak_over_mean
from planner.solver.rebalance import MODES, rebalance
from tests.planner.solver.test_balance import spans
from tests.support.strategies import cases


@given(cases(), st.data())
def test_in_a_round_a_rank_receives_once_and_sends_once(case, data):
    ids = st.sets(st.sampled_from(case.cluster.ids), min_size=1)
    a = solve(case.workload, case.cluster, alive=data.draw(ids))
    b = solve(case.workload, case.cluster, alive=data.draw(ids), loads=case.loads)
    moved = transfer(a, b, expert_bytes=10, hardware=Hardware(), naive=b)
    assert sorted(map(repr, (m for group in moved.rounds for m in group))) == sorted(map(repr, moved.moves))
    for group in moved.rounds:
        assert len({m.rank for m in group}) == len(group)
        senders = [m.peer for m in group if m.peer is not None]
        assert len(set(senders)) == len(senders)
    assert sum(moved.bytes_by_link.values()) == 10 * len(moved.moves)
    assert moved.naive_moves == len(moved.moves)
    assert (moved.seconds == 0) == (not moved.moves)


@given(cases())
def test_from_a_plan_to_itself_nothing_moves(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    assert moves(plan, plan) == ()


@given(cases(), st.sampled_from(MODES), st.sampled_from([0, 2, 16]))
def test_rebalance_cools_keeps_every_expert_and_keeps_copies_apart(case, mode, most):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    loads = case.loads / case.loads.sum(axis=1, keepdims=True)
    done = rebalance(plan, loads, mode=mode, moves_per_layer=most)
    done.plan.validate()
    assert (done.after <= done.before + 1e-12).all()
    assert done.after == pytest.approx(peak_over_mean(done.plan.slots_by_rank(), loads))
    assert (np.minimum(done.plan.copies(), 2) >= np.minimum(plan.copies(), 2)).all()
    domain = host_index(plan.expert_ranks)
    old, new = (p.slots_by_rank() for p in (plan, done.plan))
    assert (spans(new, domain, plan.experts) >= np.minimum(spans(old, domain, plan.experts), 2)).all()
    assert done.moved <= plan.moe_layers * most * (1 + (domain.max() + 1 if mode == "hierarchical" else 1))
    assert (done.moved == 0) == (done.plan.slots == plan.slots)


@given(cases())
def test_hierarchical_rebalance_moves_nothing_over_the_network(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots)
    loads = case.loads / case.loads.sum(axis=1, keepdims=True)
    host = {r.id: r.host for r in plan.ranks}
    made = moves(plan, rebalance(plan, loads, mode="hierarchical").plan)
    assert all(m.source == "local" or host[m.peer] == host[m.rank] for m in made)


def test_wrong_loads_and_modes_are_named():
    from tests.planner.plan.test_plan import small

    with pytest.raises(InputError, match="none of global, hierarchical"):
        rebalance(small(), np.ones((2, 8)), mode="local")
    with pytest.raises(InputError, match=r"shape \(1, 8\)"):
        rebalance(small(), np.ones((1, 8)))
