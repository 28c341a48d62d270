"""A problem is checked when it is made: what is wrong is named, and the defaults are those of the previous plan."""

from __future__ import annotations

import numpy as np
import pytest

from planner import Cluster, InputError, Problem, Workload, solve

WORKLOAD = Workload(moe_layers=1, experts=8, experts_per_token=2, expert_bytes=1)
OTHER = Workload(moe_layers=2, experts=4, experts_per_token=2, expert_bytes=1)
DENSE = Workload(moe_layers=0, experts=0, experts_per_token=0, expert_bytes=0)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"loads": np.ones((1, 3))}, r"shape \(1, 3\); the model has .* \(1, 8\)"),
        ({"loads": -np.ones((1, 8))}, "at least 0"),
        ({"loads": np.full((1, 8), np.nan)}, "finite"),
        ({"alive": [0, 9]}, r"ranks \[9\] are not in cluster 'local', which has 4 devices"),
        ({"survive_ranks": -1}, "survive_ranks is -1; it must be at least 0"),
        ({"slots_per_rank": 0}, "slots_per_rank is 0; it must be at least 1"),
        ({"pages_per_rank": -1}, "pages_per_rank is -1; it must be at least 0"),
        ({"epoch": -1}, "epoch is -1; it must be at least 0"),
        ({"tensor": 0}, "tensor is 0; it must be at least 1"),
        ({"protect": "all"}, "protect is 'all', none of copies, parity, none"),
        ({"switch": "never"}, "switch is 'never', none of auto, always"),
        ({"roles": {1: "spare"}}, "rank 1 has role 'spare'; roles are collocated, attention, expert, standby"),
        ({"previous": solve(OTHER, Cluster.local(2))}, "the previous plan has 2 layers x 4 experts, the model 1 x 8"),
    ],
)
def test_wrong_input_is_named(wrong, text):
    with pytest.raises(InputError, match=text):
        Problem(workload=WORKLOAD, cluster=Cluster.local(4), **wrong)


def test_a_dense_model_may_have_no_slots():
    assert solve(DENSE, Cluster.local(2), slots_per_rank=0).slots_per_rank == 0


def test_loads_are_shares_of_a_layer_at_any_scale():
    loads = np.arange(8.0)[None]
    problem = Problem(workload=WORKLOAD, cluster=Cluster.local(4), loads=loads)
    assert problem.load_shares == pytest.approx(loads / 28)
    nothing = Problem(workload=WORKLOAD, cluster=Cluster.local(4), loads=0 * loads)
    assert nothing.load_shares == pytest.approx(np.full((1, 8), 1 / 8))


def test_tensor_groups_are_as_wide_as_asked_or_as_before():
    cluster = Cluster.local(4)
    before = solve(WORKLOAD, cluster, tensor=2)
    assert Problem(workload=WORKLOAD, cluster=cluster).tensor_width == 1
    assert Problem(workload=WORKLOAD, cluster=cluster, previous=before).tensor_width == 2
    assert Problem(workload=WORKLOAD, cluster=cluster, previous=before, tensor=1).tensor_width == 1


def test_after_a_loss_the_plan_in_force_decides():
    cluster = Cluster.local(4)
    problem = Problem(workload=WORKLOAD, cluster=cluster, slots_per_rank=4, epoch=3, switch="always")
    plan = solve(WORKLOAD, cluster, slots_per_rank=4, epoch=3)
    after = problem.after_loss(plan, [0, 2, 3])
    assert (after.previous, after.epoch, after.switch, after.slots_per_rank) == (plan, 4, "always", None)
    assert [d.id for d in after.devices] == [0, 2, 3]
