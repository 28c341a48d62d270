"""Plan files: a deployment comes back as it was written, and files of version 0.1.0 are read field by field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from planner import InputError, Plan, solve
from planner.plan.deployment import Deployment, FaultTolerance, read_deployment
from tests.support.strategies import cases

OLD = Path(__file__).parent / "files_of_0_1_0"
DEPLOYMENTS = sorted(path for path in OLD.glob("*.json") if path.name != "plan.json")

PARITY = [(0, 13, (0, 1, 2, 4, 7)), (0, 15, (3, 5, 6, 8, 9)), (1, 13, (0, 1, 3, 6, 7)), (1, 15, (2, 4, 5, 10, 11))]
"""Layer, physical slot and members of the groups in parity.json."""


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Places in the JSON value `old` that `new` does not have or has otherwise; `new` may have more keys."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for key in old for d in differences(old[key], new.get(key, "missing"), f"{where}.{key}")]
    return [] if old == new else [f"{where}: {old!r} became {new!r}"]


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_every_field_of_an_old_plan_file_is_read(path: Path):
    data = json.loads(path.read_text())
    data = data.get("deployment", data)
    deployment = read_deployment(path)
    assert differences(data, json.loads(deployment.to_json())) == []
    assert Deployment.from_json(deployment.to_json()) == deployment


def test_an_old_plan_alone_is_read():
    text = (OLD / "plan.json").read_text()
    plan = Plan.from_json(text)
    assert differences(json.loads(text), json.loads(plan.to_json())) == []
    assert (plan.epoch, plan.masked) == (7, ((0, 3), (1, 5)))


def test_old_plan_files_mean_what_they_meant():
    read = {path.stem: read_deployment(path) for path in DEPLOYMENTS}
    assert {name: d.shape.describe() for name, d in read.items()} == {
        "collocated": "collocated data 2 x tensor 4 x expert 8, 2 slots",
        "dense_groups": "collocated data 4 x tensor 2 x dense 4 x expert 8, 2 slots",
        "dense_model": "collocated data 1 x tensor 4 x expert 4, 0 slots",
        "disaggregated": "disaggregated data 4 x tensor 1 x expert 3, 4 slots, 4 attention, 3 expert, 1 standby",
        "disaggregated_after_loss": (
            "disaggregated data 4 x tensor 1 x expert 2, 4 slots, 4 attention, 2 expert, 1 standby"
        ),
        "from_config": "collocated data 4 x tensor 1 x expert 4, 11 slots",
        "parity": "collocated data 8 x tensor 1 x expert 8, 2 slots",
        "status": "collocated data 4 x tensor 1 x expert 4, 2 slots",
        "tensor_groups": "collocated data 4 x tensor 2 x expert 8, 2 slots",
    }
    assert read["disaggregated_after_loss"].plan.expert_rank_ids == (5, 6)
    assert read["disaggregated_after_loss"].plan.attention_rank_ids == (0, 1, 2, 3)
    assert read["tensor_groups"].plan.groups[3] == (2, 3)
    assert [(g.layer, g.slot, g.members) for g in read["parity"].plan.parity] == PARITY
    assert read["status"].plan.masked == ((0, 3), (1, 5))
    assert read["collocated"].survive == FaultTolerance(ranks=1, hosts=1)
    assert (read["collocated"].traffic.prompt, read["collocated"].traffic.rps) == (512, 10)
    assert read["collocated"].load_array().sum(axis=1) == pytest.approx(1.0)
    assert read["collocated"].plan.figure("requests_per_group", 0.0) > 0
    assert read["from_config"].config["model_type"] == "granitemoe"
    assert read["dense_model"].workload.total_parameters == 8_030_261_248


@given(cases())
def test_a_plan_file_gives_back_the_deployment(case):
    plan = solve(case.workload, case.cluster, slots_per_rank=case.slots, loads=case.loads)
    loads = () if case.loads is None else tuple(map(tuple, case.loads.tolist()))
    deployment = Deployment(plan=plan, workload=case.workload, cluster=case.cluster, loads=loads)
    assert Deployment.from_json(deployment.to_json()) == deployment


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"holders": 1}, "unknown key 'holders' in plan file"),
        ({"survive": {"rank": 1}}, "unknown key 'rank' in FaultTolerance. Did you mean 'ranks'"),
        ({"traffic": {"prompts": 1}}, "unknown key 'prompts' in Traffic. Did you mean 'prompt'"),
        ({"cluster": {"name": "c"}}, "not a plan file: devices is missing"),
        ({"loads": [["a"]]}, "not a plan file: ValueError"),
    ],
)
def test_a_wrong_key_or_value_is_named(change: dict, text: str):
    data = json.loads((OLD / "parity.json").read_text())
    with pytest.raises(InputError, match=text):
        Deployment.from_json(json.dumps(data | change))


def test_loads_of_another_model_are_refused():
    deployment = replace(read_deployment(OLD / "parity.json"), loads=((1.0, 2.0),))
    with pytest.raises(InputError, match=r"loads have shape \(1, 2\); the model has .* \(2, 12\)"):
        deployment.load_array()
