"""Laws of the file of a plan of pools: it is read as it was written, and never taken for one that can be served."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from planner import InputError
from planner.cost.pools import design_pools
from planner.inputs.cluster import read_cluster
from planner.inputs.published import read_model
from planner.plan.deployment import Deployment, read_deployment
from planner.plan.pools import PooledDeployment, read_any_deployment
from planner.solver.servable import check_servable
from serving.config import Settings


@pytest.fixture(scope="module")
def pooled() -> PooledDeployment:
    return design_pools(read_model("olmoe-1b-7b"), read_cluster("h100:2x4")).deployment


def test_a_plan_file_is_read_as_it_was_written(pooled, tmp_path):
    assert PooledDeployment.from_json(pooled.to_json()) == pooled
    (tmp_path / "pools.json").write_text(pooled.to_json())
    (tmp_path / "plan.json").write_text(replace(pooled.decode, work="all").to_json())
    assert read_any_deployment(tmp_path / "pools.json") == pooled
    assert isinstance(read_any_deployment(tmp_path / "plan.json"), Deployment)
    with pytest.raises(InputError, match="not of one mesh"):
        read_deployment(tmp_path / "pools.json")


@pytest.mark.parametrize(("hosts", "launcher"), [(1, "local"), (2, "join")])
def test_pools_are_served_as_the_plan_says(hosts, launcher):
    whole = design_pools(read_model("olmoe-1b-7b"), read_cluster(f"h100:{hosts}x4"), tensor=1).deployment
    flags = re.fullmatch(
        r"served by `moejax serve --arch pd --prefill (\d+) --decode (\d+)(?: --launcher (\w+))?`", whole.service
    )
    assert flags is not None
    assert (flags[3] or "local") == launcher
    settings = Settings(arch="pd", prefill=int(flags[1]), decode=int(flags[2]))
    assert settings.ranks == sum(len(pool.plan.ranks) for pool in whole.pools().values())


def test_pools_of_tensor_groups_are_planned_alone():
    grouped = design_pools(read_model("olmoe-1b-7b"), read_cluster("h100:1x4"), tensor=2).deployment
    assert grouped.service == "planned, not served by this version"


def test_no_pool_can_be_served_alone(pooled):
    for pool in pooled.pools().values():
        with pytest.raises(InputError, match="planned, not served by this version"):
            check_servable(pool)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"prefill": ()},
        lambda p: {"prefill": (p.decode,)},
        lambda p: {"decode": replace(p.decode, work="all")},
        lambda p: {"prefill": (*p.prefill, *p.prefill)},
    ],
)
def test_pools_that_contradict_each_other_are_refused(pooled, change):
    with pytest.raises(InputError):
        replace(pooled, **change(pooled))


@pytest.mark.parametrize("text", ["", "[]", '{"prefill": 3, "decode": {}}', '{"prefill": [], "decode": {}}'])
def test_another_text_is_no_plan_of_pools(text):
    with pytest.raises(InputError):
        PooledDeployment.from_json(text)
