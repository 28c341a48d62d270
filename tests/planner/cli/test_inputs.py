"""Whatever is written in a file or an option: a plan, or one error that names what is wrong. Never a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.cli.main import main
from planner.cost.design import design
from planner.errors import NoFeasiblePlan, PlannerError
from planner.failures.certificate_file import Certificate
from planner.inputs.cluster import cluster_from, read_cluster
from planner.inputs.published import MODELS, read_config_values, read_model, workload_from
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment

JUNK = [None, -1, 0, "x", 1.5, [], {}, True, float("nan"), float("inf"), [1], "8", [{}], {"a": 1}, [[1]]]
CLUSTER = {
    "name": "ours",
    "hardware": {"preset": "h100", "network_bandwidth": 25e9},
    "hosts": [{"count": 2, "devices": 2, "hosts_per_rack": 4}],
    "devices": [{"id": 9, "host": "a", "rack": "b"}],
}
PLAN = json.loads(design(read_model("olmoe-1b-7b"), read_cluster("h100:1x4")).deployment.to_json())
CONFIGS = {path.stem: read_config_values(path) for path in sorted(MODELS.glob("*.json"))}


def places(value, path=()):
    """Paths to everything in a nested value, three of each list."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(3, len(value))):
            yield from places(value[i], (*path, i))


@st.composite
def spoilt(draw, base: dict):
    """`base` with one thing in it replaced by junk, left out, or under a wrong name."""
    result = copy.deepcopy(base)
    path = draw(st.sampled_from(sorted(places(base), key=str)))
    inside = result
    for step in path[:-1]:
        inside = inside[step]
    how = draw(st.sampled_from(["junk", "junk", "missing", "misspelt"])) if isinstance(inside, dict) else "junk"
    if how == "junk":
        inside[path[-1]] = draw(st.sampled_from(JUNK))
    else:
        value = inside.pop(path[-1])
        if how == "misspelt":
            inside[f"{path[-1]}s"] = value
    return result


@given(spoilt(CLUSTER))
def test_a_spoilt_cluster_is_a_cluster_or_an_error(data):
    with contextlib.suppress(PlannerError):
        assert cluster_from(data, "file").devices


@given(spoilt(PLAN))
def test_a_spoilt_plan_file_is_a_plan_or_an_error(data):
    with contextlib.suppress(PlannerError):
        Deployment.from_json(json.dumps(data)).plan.validate()


@settings(max_examples=300)
@given(st.data())
def test_a_spoilt_config_is_a_model_or_an_error(data):
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    with contextlib.suppress(PlannerError):
        assert isinstance(workload_from(data.draw(spoilt(CONFIGS[name]))), Workload)


OPTIONS = {
    "--traffic": ["prompt=nan", "prompt=inf", "prompt=0", "promt=4", "prompt", "rps=0"],
    "--survive": ["ranks=-1", "rank=1", "ranks=x"],
    "--skew": ["nan", "-1"],
    "--slots": ["0", "-3"],
    "--tensor": ["3"],
    "--dense": ["0"],
    "--standby": ["4", "-1"],
    "--weights": ["fp9"],
    "--cache": ["fp9"],
    "--loads": ["/nowhere"],
    "--out": ["/nowhere/plan.json"],
    "--pictures": ["/proc/nowhere"],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in OPTIONS.items() for v in values])
def test_a_wrong_option_of_solve_is_one_line_and_exit_code_2(option, value, capsys):
    assert main(["solve", "olmoe-1b-7b", "h100:1x4", option, value]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps(PLAN))
    return str(path)


WRONG = [
    ("degrade", "--pairs", "-5"),
    ("degrade", "--pairs", "some"),
    ("degrade", "--seed", "-1"),
    ("degrade", "--without", "copy"),
    ("degrade", "--gate", "survivable>=1.0.0"),
    ("degrade", "--gate", "survivabl>=1"),
    ("simulate", "--days", "nan"),
    ("simulate", "--mtbf", "inf"),
    ("simulate", "--seed", "-1"),
    ("simulate", "--spares", "4"),
    ("simulate", "--spares", "-1"),
    ("simulate", "--policies", "switch"),
    ("explain", "rank", "4"),
    ("verify",),
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_option_of_the_other_commands_is_one_line_and_exit_code_2(words, plan_file, capsys):
    assert main([words[0], plan_file, *words[1:]]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (("mixtral-8x8b", "h100"), "mixtral-8x7b"),
        (("mixtral-8x7b", "h10"), "h100"),
        (("mixtral-8x7b", "h100", "--traffic", "promt=1"), "prompt"),
        (("mixtral-8x7b", "h100", "--weights", "bfloat"), "bfloat16"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(words, nearest, capsys):
    assert main(["solve", *words]) == 2
    assert f"Did you mean '{nearest}'?" in capsys.readouterr().err


@given(st.floats(0.5, 400))
@example(1e6)
def test_a_plan_serves_the_requests_that_are_asked_for_or_is_none(rps):
    model, cluster = read_model("olmoe-1b-7b"), read_cluster("h100:1x4")
    traffic = Traffic(prompt=100, output=50, tpot_ms=500, rps=rps)
    most = design(model, cluster, traffic=Traffic(prompt=100, output=50, tpot_ms=500)).chosen.tokens_per_second / 50
    if rps > most * (1 + 1e-9):
        with pytest.raises(NoFeasiblePlan, match=re.escape(f"asked {rps:g}")):
            design(model, cluster, traffic=traffic)
    elif rps < most * (1 - 1e-9):
        chosen = design(model, cluster, traffic=traffic).chosen
        assert chosen.tokens_per_second / 50 >= rps * (1 - 1e-9)


CERTIFICATE = {"form": 1, "sha256": {}, "slo": {"stall_ms": 1}, "verdict": {"holds": True}}
FILES = {
    "an empty file": ("", "it is empty"),
    "no JSON": ("hello", "it is not JSON"),
    "a deep list": ("[" * 100_000, "it is not JSON"),
    "a list": ("[1, 2]", "it is a list of 2 values"),
    "another object": ('{"a": 1}', "it is an object with the keys a"),
    "null": ("null", "it is the JSON value null"),
    "bytes": (b"\xff\xfe\x00", "it is no text"),
    "a folder": (None, "Is a directory"),
    "a plan alone": (json.dumps(PLAN["plan"]), "it is a plan alone"),
    "a config": ('{"model_type": "mixtral"}', "it is a model's config.json"),
    "a plan": (json.dumps(PLAN), "it is a plan file"),
    "a certificate": (json.dumps(CERTIFICATE), "it is a certificate"),
    "a certificate of a newer version": (json.dumps(CERTIFICATE | {"form": 2}), "it is a certificate"),
}
"""The content of files (None: a folder), and what an error says of them where another file is wanted."""
PLANS = {
    "degrade": ("degrade", "FILE"),
    "certify": ("certify", "FILE", "--slo", "stall_ms=500"),
    "simulate": ("simulate", "FILE"),
    "diff": ("diff", "FILE", "PLAN"),
    "diff with": ("diff", "PLAN", "FILE"),
    "rebalance": ("rebalance", "FILE", "PLAN"),
    "verify": ("verify", "FILE", "--measured", "FILE"),
    "export": ("export", "FILE", "--to", "k8s"),
    "report": ("report", "FILE", "--html", "/dev/null"),
    "explain": ("explain", "FILE", "rank", "0"),
    "cluster": ("solve", "olmoe-1b-7b", "FILE"),
}
OTHERS = {
    "certificate": ("certify", "PLAN", "--check", "FILE"),
    "recovery": ("degrade", "PLAN", "--measured", "FILE"),
    "throughput": ("verify", "PLAN", "--measured", "FILE"),
    "counts": ("buckets", "FILE"),
    "loads": ("solve", "olmoe-1b-7b", "h100:1x4", "--loads", "FILE"),
}
READS = {"plan": {"a plan"}, "certificate": {"a certificate"}, "loads": {"a plan", "a list"}}
"""The files of FILES that are what is wanted, by what that is: loads stand in plan files, too."""


@pytest.mark.parametrize("command", [*PLANS, *OTHERS])
def test_a_file_of_another_kind_is_named_as_what_it_is_with_the_way_out(command, plan_file, tmp_path, capsys):
    good = READS.get(command, READS["plan"] if command in PLANS else set())
    for name, (content, said) in FILES.items():
        if name in good:
            continue
        file = tmp_path / f"{name.replace(' ', '_')}.json"
        file.mkdir() if content is None else file.write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        words = {"FILE": str(file), "PLAN": plan_file}
        assert main([words.get(word, word) for word in (PLANS | OTHERS)[command]]) == 2
        shown = capsys.readouterr().err
        assert len(shown.splitlines()) == 1
        if command != "cluster" or content is not None:  # a folder is no name of a cluster
            newer = command == "certificate" and "newer" in name
            said = "its form is 2, and this version reads form 1; a newer version wrote it" if newer else said
            assert all(part in shown for part in (str(file), said, "Give "))


@pytest.mark.parametrize("where", [(), ("plan",), ("workload",), ("traffic",)])
def test_a_plan_of_a_newer_version_is_said_to_be_one(where, tmp_path, capsys):
    data = copy.deepcopy(PLAN)
    inside = data
    for key in where:
        inside = inside[key]
    inside["colour"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert main(["degrade", str(tmp_path / "plan.json")]) == 2
    shown = capsys.readouterr().err
    assert "unknown key 'colour'" in shown
    assert "A newer version may have written it" in shown


@given(spoilt(CERTIFICATE | {"requests": 1, "traffic": {}, "means": [], "one_front": True, "survive": {"ranks": 1}}))
def test_a_spoilt_certificate_is_a_certificate_or_an_error(data):
    with contextlib.suppress(PlannerError):
        assert Certificate.from_json(json.dumps(data | {"signature": ""})).holds in (True, False)
