"""Models without experts go through every command, or are refused by what they lack."""

from __future__ import annotations

import json

import pytest

from planner.cli.main import main
from planner.failures.certificate import ServiceLevels, Terms, certify
from planner.failures.loss_model import LossModel
from planner.plan.deployment import FaultTolerance, read_deployment


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("dense") / "plan.json"
    assert main(["solve", "llama-3.1-8b", "h100:2x4", "--survive", "hosts=1", "--out", str(path)]) == 0
    return str(path)


def answered(capsys, *argv: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(list(argv)) == code
    shown = capsys.readouterr()
    return shown.out + shown.err


def test_a_dense_plan_has_no_slots_and_says_so(capsys, plan_file):
    plan = read_deployment(plan_file).plan
    assert (plan.slots_per_rank, plan.experts, plan.slots) == (0, 0, ())
    shown = answered(capsys, "solve", "qwen3-8b", "h100")
    assert "36 dense layers" in shown
    assert "nan" not in shown


@pytest.mark.parametrize("skew", [[], ["--skew", "1.0"]])
@pytest.mark.parametrize("protect", ["copies", "parity", "none"])
def test_neither_skew_nor_parity_changes_it(plan_file, tmp_path, skew, protect):
    other = tmp_path / "plan.json"
    words = ["solve", "llama-3.1-8b", "h100:2x4", "--survive", "hosts=1", "--out", str(other)]
    assert main([*words, *skew, "--protect", protect]) == 0
    assert read_deployment(other).plan == read_deployment(plan_file).plan


def test_every_loss_of_it_is_survived_by_what_is_left(capsys, plan_file):
    found = json.loads(answered(capsys, "degrade", plan_file, "--json", "--pairs", "all"))
    assert {row["kind"]: (row["survivable"], row["from_memory"], row["cases"]) for row in found["summary"]} == {
        "rank": (8, 8, 8),
        "host": (2, 2, 2),
        "pair": (28, 28, 28),
    }
    assert {loss["masked"] for loss in found["losses"]} == {0}
    assert all(0 < loss["capacity"] < 1 for loss in found["losses"])


def test_every_loss_of_it_is_certified_by_pricing_and_by_the_bound(plan_file):
    losses = LossModel(read_deployment(plan_file), one_front=False)
    terms = Terms(survive=FaultTolerance(ranks=2), levels=ServiceLevels(stall_ms=5000), requests=8)
    priced, proven = (certify(losses, terms, each=each) for each in (10**6, 0))
    assert priced.holds
    assert proven.holds
    assert [size.priced for size in proven.sizes] == [0, 0]


def test_it_is_simulated_explained_compared_and_exported(capsys, plan_file):
    assert "restart" in answered(capsys, "simulate", plan_file, "--mtbf", "100", "--days", "30")
    assert "if it dies: survivable (nothing to restore)" in answered(capsys, "explain", plan_file, "rank 3")
    assert "0 experts move" in answered(capsys, "diff", plan_file, plan_file)
    assert json.loads(answered(capsys, "export", plan_file, "--to", "json"))["experts"] == 0


def test_a_dense_plan_on_one_host_is_exported_without_slots(capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    assert main(["solve", "llama-3.1-8b", "h100", "--tensor", "1", "--out", path]) == 0
    shown = answered(capsys, "export", path, "--to", "env")
    assert "SLOTS" not in shown
    assert "MOEJAX_RANKS=8" in shown


def test_its_pictures_leave_out_the_placement(capsys, plan_file, tmp_path):
    folder = str(tmp_path)
    assert main(["solve", "llama-3.1-8b", "h100", "--pictures", folder]) == 0
    assert main(["degrade", plan_file, "--pictures", folder]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"memory.png", "pareto.png", "capacity.png", "recovery.png"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("solve", "llama-3.1-8b", "h100", "--slots", "2"), "--slots 2: llama-3.1-8b is a dense model"),
        (("solve", "llama-3.1-8b", "h100", "--arch", "disaggregated"), "llama-3.1-8b is a dense model"),
        (("rebalance", "PLAN", "/dev/null"), "it has no experts to rebalance"),
        (("explain", "PLAN", "expert 3"), "there is no expert 3"),
    ],
)
def test_what_needs_experts_is_refused_by_name(capsys, plan_file, words, said):
    assert said in answered(capsys, *(plan_file if word == "PLAN" else word for word in words), code=2)
