"""Laws of moves: carried out on the old slots they give the new slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import Cluster, InputError, Workload, moves, solve
from tests.support.strategies import cases


def slots(plan) -> dict:
    return {
        (layer, rank, slot): int(expert)
        for rank in plan.expert_rank_ids
        for layer, row in enumerate(plan.slots_of(rank))
        for slot, expert in enumerate(row)
    }


@given(cases(), st.data())
def test_moves_turn_the_old_slots_into_the_new(case, data):
    workload, cluster = case.workload, case.cluster
    ids = cluster.ids
    old = solve(workload, cluster, alive=data.draw(st.sets(st.sampled_from(ids), min_size=1)))
    new = solve(workload, cluster, alive=data.draw(st.sets(st.sampled_from(ids), min_size=1)), loads=case.loads)
    before, after = slots(old), slots(new)
    done = dict(before)
    for m in moves(old, new):
        held = {key[1] for key, e in before.items() if key[0] == m.layer and e == m.expert}
        held &= set(new.expert_rank_ids)
        if m.source == "local":
            assert m.rank in held
            assert m.peer is None
        elif m.source == "peer":
            assert m.peer in held
            assert m.rank not in held
        else:
            assert m.source == "store"
            assert not held
            assert m.peer is None
        assert before.get((m.layer, m.rank, m.slot)) != m.expert
        done[m.layer, m.rank, m.slot] = m.expert
    assert all(done[key] == e for key, e in after.items() if e >= 0)


def test_from_nothing_everything_comes_from_the_store():
    workload = Workload(moe_layers=2, experts=4, experts_per_token=1, expert_bytes=1)
    made = moves(None, solve(workload, Cluster.local(2)))
    assert len(made) == 2 * 2 * 4
    assert {m.source for m in made} == {"store"}


def test_plans_of_different_models_have_no_moves():
    one, two = (Workload(moe_layers=1, experts=e, experts_per_token=1, expert_bytes=1) for e in (4, 5))
    with pytest.raises(InputError, match="1 layers x 4 experts, and 1 x 5"):
        moves(solve(one, Cluster.local(2)), solve(two, Cluster.local(2)))
