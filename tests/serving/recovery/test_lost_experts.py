"""The part of a plan that can serve at once, masked experts, and reconciliation: every part is a valid plan, and the
parts lead to the desired plan."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner import solve
from planner.inputs.cluster import Cluster
from planner.inputs.workload import Workload
from serving.recovery.lost_experts import held_part, lost_share, may_serve, next_part, without_slots
from tests.support.plans import with_masked

SIZES = st.tuples(st.integers(2, 5), st.integers(1, 3), st.integers(2, 8))


def plans(ranks: int, layers: int, experts: int, dead: int, spare: int):
    """(before, after) the loss of a rank, with room for all experts."""
    work = Workload(name="w", layers=layers, moe_layers=layers, experts=experts, experts_per_token=1, expert_bytes=8)
    cluster = Cluster.local(ranks)
    slots = -(-experts // (ranks - 1)) + spare
    before = solve(work, cluster, slots_per_rank=slots, pages_per_rank=4)
    alive = [rank for rank in range(ranks) if rank != dead % ranks]
    return before, solve(work, cluster, alive=alive, previous=before)


@given(SIZES, st.integers(0, 4), st.integers(0, 2))
def test_what_can_serve_at_once_is_held_already_and_masks_exactly_what_has_no_copy(sizes, dead, spare):
    before, desired = plans(*sizes, dead, spare)
    part = held_part(desired, before)
    part.validate()
    for rank in part.rank_ids:
        here, now = before.slots_of(rank), part.slots_of(rank)
        assert ((now == -1) | (now == here)).all()
    held = {(a, int(e)) for r in desired.rank_ids for a, row in enumerate(before.slots_of(r)) for e in row}
    assert set(part.masked) >= {(a, e) for a in range(sizes[1]) for e in range(sizes[2])} - held


@given(SIZES, st.integers(0, 4), st.integers(0, 2), st.integers(1, 3))
def test_healing_ends_at_the_goal_and_never_loses_an_expert_on_the_way(sizes, dead, spare, most):
    before, desired = plans(*sizes, dead, spare)
    part, turns = held_part(desired, before), 0
    while part.slots != desired.slots:
        after = next_part(part, desired, most)
        after.validate()
        assert set(after.masked) <= set(part.masked)
        changed = after.slot_table() != part.slot_table()
        by_rank = changed.reshape(len(changed), len(desired.rank_ids), -1).sum((0, 2))
        assert by_rank.max() <= most
        assert changed.any()
        part, turns = after, turns + 1
    assert turns <= desired.slot_table().size
    assert part.masked == desired.masked == ()


@given(SIZES, st.integers(0, 4), st.data())
def test_experts_that_cannot_be_read_are_left_out_for_as_long(sizes, dead, data):
    before, desired = plans(*sizes, dead, 0)
    part = held_part(desired, before)
    but = data.draw(st.sets(st.sampled_from(part.masked))) if part.masked else set()
    whole = next_part(part, desired, desired.slot_table().size, excluding=but)
    whole.validate()
    assert set(whole.masked) == but


@given(SIZES, st.data())
def test_slots_that_are_taken_out_leave_a_plan_that_masks_what_is_nowhere(sizes, data):
    before, _ = plans(*sizes, 0, 1)
    rank = data.draw(st.sampled_from(before.rank_ids))
    slots = [(rank, layer, s) for layer in range(sizes[1]) for s in range(before.slots_per_rank)]
    chosen = data.draw(st.sets(st.sampled_from(slots)))
    after = without_slots(before, chosen)
    after.validate()
    assert all(after.slots_of(rank)[layer, s] == -1 for _, layer, s in chosen)


def test_the_share_of_masked_experts_is_that_of_their_measured_traffic():
    before, _ = plans(2, 1, 4, 0, 0)
    masked = with_masked(before, [(0, 1)])
    loads = np.array([[10, 30, 40, 20]])
    assert lost_share(masked, loads) == 0.3
    assert lost_share(masked, np.zeros((1, 4))) == 0.25
    assert lost_share(before, loads) == 0.0


def test_a_policy_lets_masked_experts_wait_or_not():
    before, _ = plans(2, 1, 4, 0, 0)
    masked, loads = with_masked(before, [(0, 1)]), np.array([[0, 0, 60, 40]])
    assert may_serve(before, "wait", loads, 0.0)
    assert not may_serve(masked, "wait", loads, 1.0)
    assert may_serve(masked, "mask", loads, 0.0)
    assert may_serve(masked, "auto", loads, 0.05)
    assert not may_serve(masked, "auto", np.array([[10, 30, 40, 20]]), 0.05)
