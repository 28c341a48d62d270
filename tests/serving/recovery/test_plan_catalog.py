import dataclasses

import pytest

from planner.inputs.cluster import Cluster
from serving.config import Settings
from serving.errors import NoCapacity
from serving.executor.mesh_key import MeshKey
from serving.launch.rank_process import HostPaths
from serving.recovery.plan_catalog import PlanCatalog, pages_per_rank
from simulation.hand_model import PREPARED
from tests.support.recovery_machine import SETTINGS


def plans(hosts: list[str] | None = None, **settings) -> PlanCatalog:
    chosen = Settings(**{**vars(SETTINGS), "ranks": 4, "lattice_depth": 1, **settings})
    return PlanCatalog(chosen, PREPARED, Cluster.local(4, hosts=hosts or ["h"] * 4))


def test_the_order_in_which_ranks_are_named_is_nothing_to_their_plan():
    p = plans()
    assert p.of([3, 1, 0, 2]) is p.base
    assert p.of([2, 0, 1]) is p.of({0, 1, 2}) is p.in_lattice([0, 1, 2])


def test_what_nobody_foresaw_is_planned_when_asked_for():
    p = plans()
    assert p.in_lattice([0, 3]) is None
    assert p.of([0, 3]).rank_ids == (0, 3)


def test_where_no_plan_is_possible_it_says_what_is_missing():
    with pytest.raises(NoCapacity, match="back"):
        plans().of([])


def test_meshes_after_losses_are_of_those_alive_and_the_largest_come_first():
    p = plans(lattice_depth=2)
    keys = p.meshes_after_losses((0, 1, 2, 3), 2)
    assert [len(key.ranks) for key in keys] == [3] * 4 + [2] * 6
    assert set(p.meshes_after_losses((0, 1, 2, 3), 1)) == set(keys[:4])
    assert {key.ranks for key in p.meshes_after_losses((0, 1, 2), 1)} == {(0, 1), (0, 2), (1, 2)}
    assert MeshKey.of(p.of([0, 1])) in keys


def test_the_loss_of_a_host_is_prepared_for_by_the_present_hosts_of_ranks():
    p = plans(["a", "a", "b", "c"])
    assert p.in_lattice([2, 3]) is not None
    assert p.in_lattice([0, 1]) is None
    host_paths = HostPaths(host="b", rack="r", store="", executables="", disk="")
    p.move(3, host_paths)
    assert p.device_of(3).host == "b"
    assert p.in_lattice([0, 1]) is not None
    assert (0, 1) in {key.ranks for key in p.meshes_after_losses((0, 1, 2, 3), 1)}


def test_a_cache_holds_two_contexts_at_least_and_a_short_request_in_every_row_while_that_is_cheap():
    settings = dataclasses.replace(SETTINGS, pages_per_rank=None, page_size=16, buckets=((8, 0), (4, 1)))
    assert pages_per_rank(settings, 64, 1) == 8 * 256 // 16
    assert pages_per_rank(settings, 4000, 1 << 20) == 2 * 250
    assert pages_per_rank(dataclasses.replace(settings, pages_per_rank=7), 64, 1) == 7
