"""Tensor groups: who attends together before and after losses, and which of their plans are served."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import Problem, solve
from planner.cli.kubernetes import environment, settings
from planner.cost.design import design
from planner.errors import InputError, NoFeasiblePlan
from planner.inputs.cluster import Cluster, Device, read_cluster
from planner.inputs.published import find_published, read_model
from planner.inputs.workload import Workload
from planner.plan.plan import Plan
from planner.solver.lattice import build_lattice
from planner.solver.servable import check_servable, served_pages
from planner.solver.tensor_groups import tensor_groups

WORKLOAD = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1000, rest_bytes=1000, page_tokens=16)


def cluster_of(hosts: list[int]) -> Cluster:
    """A cluster with so many ranks on each host."""
    names = [f"host{h}" for h, count in enumerate(hosts) for _ in range(count)]
    return Cluster(name="some", devices=tuple(Device(id=i, host=h) for i, h in enumerate(names)))


@st.composite
def losses(draw) -> tuple[Cluster, int, list[int], list[int]]:
    """A cluster, the width of its groups, and the ranks alive at two moments."""
    cluster = cluster_of(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    ids = list(cluster.ids)
    first, second = (draw(st.lists(st.sampled_from(ids), unique=True, min_size=1)) for _ in range(2))
    return cluster, draw(st.integers(1, 4)), sorted(first), sorted(second)


@given(losses())
def test_groups_are_disjoint_of_one_host_and_as_many_as_can_be(case) -> None:
    cluster, tensor, alive, _ = case
    groups = tensor_groups(cluster.alive(alive), tensor)
    host = {d.id: d.host for d in cluster.devices}
    assert all(len(ids) == tensor and len({host[rank] for rank in ids}) == 1 for ids in groups)
    members = [rank for ids in groups for rank in ids]
    assert len(members) == len(set(members))
    left = [host[rank] for rank in alive if rank not in members]
    assert all(left.count(name) < tensor for name in left)


@given(losses())
def test_a_group_that_is_whole_stays_and_nobody_changes_his_share_for_nothing(case) -> None:
    cluster, tensor, first, second = case
    if not tensor_groups(cluster.alive(first), tensor):
        return
    plan = solve(WORKLOAD, cluster, alive=first, tensor=tensor)
    groups = tensor_groups(cluster.alive(second), tensor, plan)
    whole = [ids for ids in dict.fromkeys(plan.groups.values()) if set(ids) <= set(second)]
    assert set(whole) <= set(groups)
    before = {rank: ids.index(rank) for rank, ids in plan.groups.items()}
    for ids in groups:
        taken = {before[rank] for rank in ids if before.get(rank) == ids.index(rank)}
        moved = [before[rank] for rank in ids if rank in before and before[rank] != ids.index(rank)]
        assert all(share in taken for share in moved), "a rank gave up a share that nobody in the group has kept"


@given(losses())
def test_a_plan_says_who_attends_with_whom_and_survives_its_json(case) -> None:
    cluster, tensor, first, second = case
    if not all(tensor_groups(cluster.alive(alive), tensor) for alive in (first, second)):
        return
    base = solve(WORKLOAD, cluster, alive=first, tensor=tensor)
    plan = solve(WORKLOAD, cluster, alive=second, previous=base)
    for each in (base, plan):
        each.validate()
        assert Plan.from_json(each.to_json()) == each
        assert set(each.groups) == set(each.attention_rank_ids)
        assert set(each.expert_rank_ids) == set(each.rank_ids)
        assert dict(each.axes)["data"] * tensor == len(each.attention_rank_ids)


def test_every_loss_of_one_rank_leaves_its_group_to_hold_experts() -> None:
    base = solve(WORKLOAD, Cluster.local(4), tensor=2)
    lattice = build_lattice(Problem(workload=WORKLOAD, cluster=Cluster.local(4)), base, depth=1)
    for dead, plan in lattice.plans.items():
        mate = next(iter(dead)) ^ 1
        assert plan.role(mate) == "expert"
        assert set(plan.attention_rank_ids) == set(base.rank_ids) - dead - {mate}


@pytest.mark.parametrize(("alive", "group"), [([1, 2], (2, 1)), ([0, 3], (0, 3)), ([0, 2], (0, 2))])
def test_what_is_left_of_two_groups_is_one_in_which_as_few_as_can_be_change_their_share(alive, group) -> None:
    base = solve(WORKLOAD, Cluster.local(4), tensor=2)
    assert tensor_groups(Cluster.local(4).alive(alive), 2, base) == [group]


def test_without_a_whole_group_there_is_no_plan_and_it_says_why() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"the 3 ranks alive make no tensor group of 4 ranks of a host"):
        solve(WORKLOAD, Cluster.local(8), alive=[0, 1, 2], tensor=4)


def test_tensor_groups_are_exported_with_the_cache_that_their_unsharded_weights_leave() -> None:
    _, config = find_published("mixtral-8x7b")
    model = read_model("mixtral-8x7b")
    d = replace(design(model, read_cluster("h100"), tensor=2).deployment, config=config)
    check_servable(d)
    chosen = settings(d)
    assert chosen["tensor"] == 2
    assert "MOEJAX_TENSOR=2" in environment(d, settings(d))
    a_rank = model.rest_bytes - model.attention_bytes // 2 + d.plan.slots_per_rank * model.slot_bytes
    cache = 2 * model.page_bytes // 2 * served_pages(d)  # of two members, half of the heads each
    planned = d.cluster.hardware.memory_bytes or 0
    assert 0.8 * planned < a_rank + cache <= planned


@pytest.mark.parametrize(
    ("model", "cluster", "why"),
    [
        ("deepseek-v3", "h200:8x8", r"tensor groups of 2, which cannot share 1 key/value heads"),
        ("olmoe-1b-7b", "h100", r"tensor groups of 2, of a model that norms the queries of all heads at once"),
    ],
)
def test_tensor_groups_that_are_not_served_are_refused(model: str, cluster: str, why: str) -> None:
    _, config = find_published(model)
    d = replace(design(read_model(model), read_cluster(cluster), tensor=2).deployment, config=config)
    with pytest.raises(InputError, match=why):
        check_servable(d)
