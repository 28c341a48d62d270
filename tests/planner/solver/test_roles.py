"""Laws of roles after a loss: both sides stay, and as few ranks as possible change theirs."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from planner import solve
from planner.inputs.cluster import Cluster
from planner.inputs.workload import Workload
from planner.solver.roles import SWITCHES, roles_after

WORKLOAD = Workload(
    name="eight experts",
    layers=4,
    moe_layers=4,
    experts=8,
    experts_per_token=2,
    expert_bytes=1000,
    rest_bytes=1000,
    cache_bytes_per_token=10,
    page_tokens=32,
    hidden_bytes=512,
)


@given(
    attention=st.integers(1, 6),
    experts=st.integers(1, 6),
    slots=st.integers(1, 16),
    switch=st.sampled_from(SWITCHES),
    data=st.data(),
)
def test_both_sides_stay_as_long_as_there_are_two_ranks(
    attention: int, experts: int, slots: int, switch: str, data: st.DataObject
) -> None:
    before = {rank: "attention" if rank < attention else "expert" for rank in range(attention + experts)}
    alive = sorted(data.draw(st.sets(st.sampled_from(sorted(before)), min_size=1)))
    roles = roles_after(alive, before, experts=16, slots=slots, switch=switch)
    assert sorted(roles) == alive
    if len(alive) == 1:
        assert set(roles.values()) == {"collocated"}
        return
    assert set(roles.values()) == {"attention", "expert"}
    changed = [rank for rank in alive if roles[rank] != before[rank]]
    holding = sum(role == "expert" for role in roles.values())
    wanted = max(-(-16 // slots), experts if switch == "always" else 1)
    if holding > wanted:
        assert not [rank for rank in changed if roles[rank] == "expert"]
    if holding < wanted and any(before[rank] == "attention" for rank in alive):
        assert sum(role == "attention" for role in roles.values()) == 1


def test_every_loss_of_two_and_two_has_a_whole_plan() -> None:
    cluster = Cluster.local(4)
    roles = {0: "attention", 1: "attention", 2: "expert", 3: "expert"}
    for survive, switch in itertools.product((0, 1), SWITCHES):
        base = solve(WORKLOAD, cluster, survive_ranks=survive, roles=roles, pages_per_rank=8)
        for count in (1, 2, 3):
            for alive in itertools.combinations(range(4), count):
                plan = solve(WORKLOAD, cluster, alive=alive, previous=base, switch=switch)
                plan.validate()
                assert not plan.masked
                assert plan.attention_rank_ids
                assert plan.expert_rank_ids


def test_an_expert_rank_that_leaves_too_few_slots_is_made_up_for() -> None:
    cluster = Cluster.local(4)
    roles = {0: "attention", 1: "attention", 2: "expert", 3: "expert"}
    base = solve(WORKLOAD, cluster, survive_ranks=0, roles=roles, pages_per_rank=8)
    plan = solve(WORKLOAD, cluster, alive=(0, 1, 3), previous=base)
    assert [rank.role for rank in plan.ranks] == ["attention", "expert", "expert"]
    assert plan.slots_per_rank == base.slots_per_rank
