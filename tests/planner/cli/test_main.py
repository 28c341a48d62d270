"""Every command answers in text and in JSON, and its exit code says whether the news is good."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from planner.cli.main import main
from planner.cost.band import OWN, range_text
from planner.cost.buckets import StepCounts, StepDemand, read_buckets
from planner.plan.deployment import Deployment
from planner.plan.pools import PooledDeployment


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["solve", "olmoe-1b-7b", "h100", "--skew", "0.7", "--out", str(path)]) == 0
    return str(path)


def data(capsys, *argv: str, code: int = 0) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def text(capsys, *argv: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(list(argv)) == code
    return capsys.readouterr().out


def test_solve_says_the_plan_and_why_the_others_lost(capsys):
    shown = text(capsys, "solve", "mixtral-8x7b", "h100", "--traffic", "prompt=1000,output=100")
    assert "plan: collocated data 8 x tensor 1 x expert 8" in shown
    assert "fewer tokens/s" in shown
    assert "expert slots" in shown
    found = data(capsys, "solve", "mixtral-8x7b", "h100")
    assert {"arch", "deployment", "candidates", "pareto", "peak_load", "first_loss", "front"} == set(found)
    plan = Deployment.from_json(json.dumps(found)).plan
    assert {f.source for f in plan.cost} == {"estimate"}
    ranges = {f.name: (f.low, f.value, f.high) for f in plan.cost if f.low is not None and f.high is not None}
    assert {"tokens_per_second", "ttft", "step", "step_experts"} <= set(ranges)
    assert all(low <= value <= high for low, value, high in ranges.values())


def test_without_arguments_the_commands_are_listed(capsys):
    shown = text(capsys)
    assert all(name in shown for name in ("solve", "degrade", "certify", "simulate", "report"))


def test_what_does_not_fit_is_exit_code_1_and_wrong_input_2(capsys):
    assert main(["solve", "deepseek-v3", "h100"]) == 1
    assert "Add ranks" in capsys.readouterr().err
    assert main(["solve", "deepseek-v4", "h100"]) == 2
    assert "neither a file nor one of the models" in capsys.readouterr().err
    error = data(capsys, "solve", "deepseek-v3", "h100", code=1)
    assert error["status"] == "UNAVAILABLE"
    assert main(["degrade", "/nowhere/plan.json"]) == 2
    assert "cannot read plan file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["solve"])


def test_solve_and_degrade_have_one_recovery_and_one_pace(capsys, tmp_path):
    plan = str(tmp_path / "plan.json")
    found = data(capsys, "solve", "olmoe-1b-7b", "h100:8x8", "--out", plan)
    losses = data(capsys, "degrade", plan, "--kinds", "rank")
    assert losses["losses"][0]["phases"] == found["first_loss"]["phases"]
    assert losses["front"] == found["front"]
    assert not found["front"]["kept"]
    for command in (["solve", "olmoe-1b-7b", "h100:8x8"], ["degrade", plan]):
        assert "beyond what one front can pace" in text(capsys, *command)
    slower = data(capsys, "degrade", plan, "--kinds", "rank", "--store", "disk")["summary"][0]
    assert slower["worst_stall_ms"] >= losses["summary"][0]["worst_stall_ms"]


def test_certify_holds_or_names_the_smallest_loss_and_signs(capsys, plan_file, tmp_path):
    key, file = tmp_path / "key", str(tmp_path / "certificate.json")
    key.write_text("0123456789abcdef")
    terms = ["--survive", "ranks=2,hosts=1", "--load", "0.5", "--without-front", "--key", str(key), "--out", file]
    made = data(capsys, "certify", plan_file, "--slo", "tpot_ms=50,stall_ms=500", *terms, code=1)
    failing = next(size["failing"] for size in made["verdict"]["sizes"] if size["failing"])
    assert failing["ranks"] == list(range(8))
    assert "no rank is left" in failing["missed"]
    made = data(capsys, "certify", plan_file, "--slo", "tpot_ms=50,stall_ms=500", *terms[2:], "--survive", "ranks=2")
    assert made["holds"]
    assert made["signed"]
    assert data(capsys, "certify", plan_file, "--check", file, "--key", str(key))["differences"] == []
    shown = text(capsys, "certify", plan_file, "--slo", "stall_ms=1", code=1)
    assert "the smallest loss that misses it is rank 0" in shown
    assert "--load" in text(capsys, "certify", plan_file, "--slo", "tpot_ms=20", "--without-front", code=1)
    key.write_text("fedcba9876543210")
    assert main(["certify", plan_file, "--check", file, "--key", str(key)]) == 2
    assert main(["certify", plan_file]) == 2
    assert main(["certify", plan_file, "--slo", "stall_ms=1", "--load", "2"]) == 2


def test_certify_takes_plans_of_pools(capsys, tmp_path):
    plan, file, key = (str(tmp_path / name) for name in ("pools.json", "certificate.json", "key"))
    (tmp_path / "key").write_text("0123456789abcdef")
    assert main(["solve", "qwen3-30b-a3b", "h100:4x2", "--arch", "pd", "--out", plan]) == 0
    capsys.readouterr()
    terms = ["--survive", "ranks=2,hosts=1", "--load", "0.5", "--without-front", "--key", key, "--out", file]
    made = data(capsys, "certify", plan, "--slo", "stall_ms=60000,capacity=0.01", *terms)
    assert made["holds"]
    sizes = made["verdict"]["sizes"]
    assert {(size["kind"], size["lost"]) for size in sizes} == {("rank", 1), ("rank", 2), ("host", 1)}
    assert sum(size["losses"] for size in sizes) == 8 + 28 + 4
    assert all(size["ranges"]["capacity"]["low"] <= size["worst"]["capacity"] for size in sizes)
    assert data(capsys, "certify", plan, "--check", file, "--key", key)["differences"] == []
    shown = text(capsys, "certify", plan, "--slo", "stall_ms=1", "--without-front", code=1)
    assert re.search(r"the smallest loss that misses it is rank \d+ \(decode\): stall_ms", shown)
    shown = text(capsys, "certify", plan, "--slo", "capacity=0.999", "--survive", "hosts=3", code=1)
    assert "does not hold" in shown


def test_degrade_counts_losses_and_gates(capsys, plan_file):
    shown = text(capsys, "degrade", plan_file)
    assert re.search(
        r"1-rank losses: 8/8 survivable, \d of them without the store, worst stall \d+ ms\s+\([\d.,]+-", shown
    )
    found = data(capsys, "degrade", plan_file, "--gate", "survivable>=1.0, worst_stall_ms<=5000")
    assert len(found["losses"]) == 8 + 28
    assert found["gate_broken"] == []
    assert data(capsys, "degrade", plan_file, "--gate", "capacity>=0.99", code=1)["gate_broken"]
    assert main(["degrade", plan_file, "--without", "shop"]) == 2


RANGED = {
    "tpot_s",
    "ttft_s",
    "step_s",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "tokens_per_second_per_user",
}


def assert_ranges(ranges: dict, names: set[str]) -> None:
    assert names <= set(ranges)
    for each in ranges.values():
        assert each["low"] <= each["mid"] <= each["high"]


def test_every_figure_of_every_command_has_its_range(capsys, plan_file, tmp_path):
    pools = str(tmp_path / "pools.json")
    found = data(capsys, "solve", "qwen3-30b-a3b", "h100:4x2", "--arch", "auto")
    assert set(found["architectures"]) == {"collocated", "disaggregated", "pd"}
    for each in found["architectures"].values():
        assert_ranges(each["ranges"], {"tpot_s", "ttft_s", "tokens_per_second", "tokens_per_second_per_user"})
    found = data(capsys, "solve", "qwen3-30b-a3b", "h100:4x2")
    for each in found["candidates"]:
        assert each["reason"] or (assert_ranges(each["ranges"], RANGED) is None and each["band"]["error_factor"])
    assert all({"per_user", "per_device"} == set(each["ranges"]) for each in found["pareto"])
    losses = {"stall_ms", "moved_stall_ms", "capacity"}
    assert_ranges(found["first_loss"]["ranges"], losses)
    found = data(capsys, "solve", "qwen3-30b-a3b", "h100:4x2", "--arch", "pd", "--out", pools)
    for each in found["splits"]:
        assert_ranges(each["ranges"], {"tpot_s", "ttft_s", "tokens_per_second", "requests_per_second_of_decode"})
    for file in (plan_file, pools):
        found = data(capsys, "degrade", file)
        for each in found["losses"]:
            assert not each["survivable"] or assert_ranges(each["ranges"], losses) is None
        for row in found["summary"]:
            assert_ranges(row["worst_ranges"], losses)
    made = data(capsys, "certify", plan_file, "--slo", "stall_ms=500", "--without-front", "--load", "0.5")
    for size in made["verdict"]["sizes"]:
        assert_ranges(size["ranges"], losses | {"tpot_ms"})
    worst = made["verdict"]["sizes"][0]["ranges"]["stall_ms"]
    for level, sure in ((1.01 * worst["high"], True), ((worst["mid"] + worst["high"]) / 2, False)):
        argv = ["certify", plan_file, "--slo", f"stall_ms={level}", "--without-front", "--load", "0.5"]
        assert (data(capsys, *argv)["verdict"]["unsure"] == "") == sure
        said = "also at their worse ends" if sure else "not at the worse ends of the ranges"
        assert said in text(capsys, *argv)


def test_simulate_compares_policies(capsys, plan_file):
    found = data(capsys, "simulate", plan_file, "--days", "30", "--mtbf", "500", "--seed", "1")
    assert [p["policy"] for p in found["policies"]] == ["restart", "mask", "copy", "spare"]
    assert "availability" in text(capsys, "simulate", plan_file, "--policies", "copy,restart")


def test_rebalance_then_diff(capsys, plan_file, tmp_path):
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps({"loads": (np.random.default_rng(0).random((16, 64)) + 0.1).tolist()}))
    after = str(tmp_path / "after.json")
    found = data(capsys, "rebalance", plan_file, str(loads), "--out", after)
    assert max(found["peak_after"]) < max(found["peak_before"])
    moved = data(capsys, "diff", plan_file, after)
    assert moved["moves"] == found["transfer"]["moves"] == len(moved["list"])
    assert moved["moves"] < moved["naive_moves"]
    assert "a fresh placement would move" in text(capsys, "diff", plan_file, after)
    loads.write_text("[[1, 2]]")
    assert main(["rebalance", plan_file, str(loads)]) == 2


def test_explain_a_rank_and_an_expert(capsys, plan_file):
    assert "if it dies: survivable" in text(capsys, "explain", plan_file, "rank", "3")
    assert "copies on ranks" in text(capsys, "explain", plan_file, "expert", "5", "layer", "2")
    assert len(data(capsys, "explain", plan_file, "expert 5")["layers"]) == 16
    rank = data(capsys, "explain", plan_file, "3")
    assert rank["rank"] == 3
    stall = rank["ranges"]["stall_ms"]
    assert stall["low"] < stall["mid"] < stall["high"]
    said = " ".join(text(capsys, "explain", plan_file, "rank", "3").split())  # a line may be broken anywhere
    assert f"other streams wait {range_text(stall)} ms" in said
    for wrong in ("rank 99", "expert 64", "expert 1 layer 16", "host 3"):
        assert main(["explain", plan_file, wrong]) == 2


def test_export_for_kubernetes_environment_and_json(capsys, plan_file):
    shown = text(capsys, "export", plan_file, "--to", "k8s", "--name", "mine")
    assert "kind: LeaderWorkerSet" in shown
    assert "kind: PodDisruptionBudget" in shown
    assert "nvidia.com/gpu: 8" in shown
    env = text(capsys, "export", plan_file, "--to", "env").splitlines()
    assert "MOEJAX_RANKS=8" in env
    assert json.loads(text(capsys, "export", plan_file, "--to", "json"))["experts"] == 64
    assert "kind" in data(capsys, "export", plan_file, "--to", "k8s")["text"]


def test_a_plan_over_several_hosts_is_exported_as_a_front_that_hosts_join(capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    assert main(["solve", "deepseek-v3", "h200:4x8", "--tensor", "1", "--dense", "1", "--out", path]) == 0
    assert "MOEJAX_LAUNCHER=join" in text(capsys, "export", path, "--to", "env").splitlines()
    manifest = text(capsys, "export", path, "--to", "k8s", "--name", "moe")
    assert "size: 5" in manifest  # the front and four hosts
    assert "--count=8" in manifest
    parts = manifest.split("\n---\n")
    [of_edges] = (each for each in parts if "name: moe-edges\n" in each and "kind: Deployment" in each)
    assert "moe-edge-tls" in of_edges
    assert "rank" not in of_edges, "edges have the key of the front and the ranks"
    assert "moe-rank-tls" in manifest.replace(of_edges, "")


def test_verify_against_measurements(capsys, plan_file, tmp_path):
    measured = tmp_path / "throughput.json"
    runs = [{"concurrency": c, "itl_ms": 10 + 0.5 * c} for c in (1, 8, 32)]
    measured.write_text(json.dumps({"runs": runs}))
    out = str(tmp_path / "calibrated.json")
    found = data(capsys, "verify", plan_file, "--measured", str(measured), "--out", out)
    assert [r["concurrency"] for r in found["measured"]] == [1, 8, 32]
    assert data(capsys, "degrade", out)["summary"]
    assert data(capsys, "solve", "olmoe-1b-7b", out)["deployment"]["cluster"]["hardware"] == found["hardware"]
    assert main(["verify", plan_file]) == 2


def test_a_plan_of_several_kinds_is_verified_as_it_was_solved(capsys, tmp_path):
    hosts = '[[hosts]]\ncount = 1\ndevices = 8\n[[hosts]]\ncount = 1\ndevices = 8\npreset = "b200"\n'
    (tmp_path / "mixed.toml").write_text(f'name = "mixed"\n[hardware]\npreset = "h100"\n{hosts}')
    plan, measured = str(tmp_path / "plan.json"), tmp_path / "throughput.json"
    solved = data(capsys, "solve", "olmoe-1b-7b", str(tmp_path / "mixed.toml"), "--out", plan)
    measured.write_text(json.dumps({"runs": [{"concurrency": c, "itl_ms": 10 + 0.5 * c} for c in (1, 8, 32)]}))
    found = data(capsys, "verify", plan, "--measured", str(measured))
    cost = {each["name"]: each["value"] for each in solved["deployment"]["plan"]["cost"]}
    assert {name for name in cost if name.startswith("requests_per_group_")} == {
        "requests_per_group_h100",
        "requests_per_group_b200",
    }
    assert found["estimate_step_s"] == pytest.approx(cost["step"], rel=0.02)  # the peak of the experts' load apart


def test_pictures_are_drawn(capsys, plan_file, tmp_path):
    main(["solve", "olmoe-1b-7b", "h100", "--pictures", str(tmp_path)])
    main(["degrade", plan_file, "--kinds", "rank", "--pictures", str(tmp_path), "--svg"])
    assert {p.name for p in tmp_path.iterdir()} == {
        "placement.png",
        "memory.png",
        "pareto.png",
        "capacity.svg",
        "recovery.svg",
    }
    assert all(p.stat().st_size > 3000 for p in tmp_path.iterdir())


def test_buckets_are_proposed_of_what_a_server_counted(capsys, tmp_path):
    file = tmp_path / "counts.json"
    wanted = {(5, 0): StepDemand(900, 3600, 6000), (1, 3): StepDemand(100, 400, 9000)}
    served = ((2, 0), (8, 0), (32, 0), (8, 2), (32, 8))
    file.write_text(StepCounts(wanted, served=served, about={"model": "tiny", "ranks": 4}).to_json())
    found = data(capsys, "buckets", str(file))
    assert found["exact"]
    assert [each["bucket"] for each in found["current"]["buckets"]] == [list(bucket) for bucket in served]
    used = {tuple(each["bucket"]): each["steps"] for each in found["proposed"]["buckets"] if each["steps"]}
    assert used == {(5, 0): 900, (1, 3): 100}
    assert found["proposed"]["rows"] == 3600 * 5 + 400 * 97
    assert found["proposed"]["padding"] < found["current"]["padding"]
    shown = text(capsys, "buckets", str(file))
    assert "1,000 steps (model tiny, ranks 4)" in shown
    assert re.search(r"proposed: \d+\.\d% of 56,800 rows are padding \(no others are better\)", shown)
    served_with = re.search(r"serve --buckets '(.*)'", shown)
    assert served_with is not None
    assert [list(b) for b in read_buckets(served_with[1])] == [each["bucket"] for each in found["proposed"]["buckets"]]
    fewer = data(capsys, "buckets", str(file), "--count", "2", "--current", "8,0;16,4")
    assert [each["bucket"] for each in fewer["proposed"]["buckets"]][-1] == [16, 4]
    assert len(fewer["proposed"]["buckets"]) <= 2
    assert main(["buckets", str(file), "--current", "8"]) == 2
    assert main(["buckets", str(file), "--count", "0"]) == 2
    file.write_text(StepCounts(wanted).to_json())
    assert main(["buckets", str(file)]) == 2
    assert "give --current" in capsys.readouterr().err


def test_pools_are_found_compared_and_never_exported_for_a_server(capsys, tmp_path):
    plan = str(tmp_path / "pools.json")
    shown = text(capsys, "solve", "qwen3-30b-a3b", "h100:3x4", "--arch", "pd", "--out", plan)
    for part in (
        "prefill: ",
        "decode: ",
        "transfer: ",
        "served by `moejax serve --arch pd",
        "gain",
        "splits compared",
    ):
        assert part in " ".join(shown.split())
    found = data(capsys, "solve", "qwen3-30b-a3b", "h100:3x4", "--arch", "auto")
    rates = {arch: each["tokens_per_second"] for arch, each in found["architectures"].items()}
    assert set(rates) == {"collocated", "disaggregated", "pd"}
    assert rates[found["arch"]] == max(rates.values())
    rows = {row["kind"] for row in data(capsys, "degrade", plan)["summary"]}
    assert {"prefill_rank", "decode_rank"} <= rows
    times = tmp_path / "recovery.json"
    times.write_text(json.dumps({"summary": {"detect_ms": 9, "survivor_stall_ms": 30}, "kills": [{"adopt_ms": 3}]}))
    bands = data(capsys, "degrade", plan, "--measured", str(times))["band"]
    assert all(each["phase_factors"]["detect"] == OWN for each in bands.values())
    assert "prefill_rank losses" in text(capsys, "degrade", plan, "--gate", "decode_rank.survivable>=1.0")
    assert json.loads(text(capsys, "export", plan, "--to", "json"))["decode"]["work"] == "decode"


def test_a_plan_of_pools_is_exported_as_one_server(capsys, tmp_path):
    plan = str(tmp_path / "plan.json")
    assert main(["solve", "qwen3-30b-a3b", "h100:3x4", "--arch", "pd", "--out", plan]) == 0
    found = json.loads(text(capsys, "export", plan, "--to", "json"))
    prefill, decode = (
        sum(len(each["plan"]["ranks"]) for each in found["prefill"]),
        len(found["decode"]["plan"]["ranks"]),
    )
    env = text(capsys, "export", plan, "--to", "env").splitlines()
    assert {"MOEJAX_ARCH=pd", f"MOEJAX_PREFILL={prefill}", f"MOEJAX_DECODE={decode}", "MOEJAX_RANKS=12"} <= set(env)
    manifest = text(capsys, "export", plan, "--to", "k8s", "--name", "moe")
    assert f"--prefill={prefill}" in manifest
    assert "size: 4" in manifest, "the front and three hosts"
    states = str(tmp_path / "states.json")
    assert main(["solve", "qwen3-next-80b-a3b", "h100:2x8", "--arch", "pd", "--out", states]) == 0
    capsys.readouterr()
    assert main(["export", states, "--to", "k8s"]) == 2
    assert "whose context is a state" in capsys.readouterr().err


def test_plans_of_pools_are_simulated_explained_and_compared(capsys, tmp_path):
    plan, one = str(tmp_path / "pools.json"), str(tmp_path / "plan.json")
    assert main(["solve", "qwen3-30b-a3b", "h100:3x4", "--arch", "pd", "--out", plan]) == 0
    assert main(["solve", "qwen3-30b-a3b", "h100:3x4", "--out", one]) == 0
    found = data(capsys, "simulate", plan, "--days", "300", "--mtbf", "3000", "--seed", "3")["policies"]
    assert {each["side"] for each in found} == {"together", "prefill", "decode"}
    for each in found:
        for name, ends in each["ranges"].items():
            assert ends["low"] <= ends["mid"] <= ends["high"], name
    shown = text(capsys, "simulate", plan, "--days", "300", "--mtbf", "3000", "--seed", "3")
    for side in ("together: 300 days", "prefill: 300 days", "decode: 300 days"):
        assert side in shown
    pools = PooledDeployment.from_json((tmp_path / "pools.json").read_text())
    for name, pool in pools.pools().items():
        rank = pool.plan.rank_ids[0]
        facts = data(capsys, "explain", plan, "rank", str(rank))
        assert (facts["pool"], facts["rank"]) == (name, rank)
        said = " ".join(text(capsys, "explain", plan, "rank", str(rank)).split())
        assert f"in the pool {name}, which {'decodes' if name == 'decode' else 'computes prompts'}" in said
        assert "if it dies: survivable" in said
    layers = data(capsys, "explain", plan, "expert", "5", "layer", "2")["pools"]
    for name, pool in pools.pools().items():
        assert set(layers[name][0]["ranks"]) <= set(pool.plan.rank_ids)
    assert main(["explain", plan, "rank", "99"]) == 2
    assert data(capsys, "diff", plan, plan)["moves"] == 0
    apart = data(capsys, "diff", one, plan)
    assert sum(each["moves"] for each in apart["pools"].values()) == apart["moves"] > 0
    assert data(capsys, "diff", plan, one)["moves"] > 0
    assert "decode: " in text(capsys, "diff", one, plan)


def test_drafts_of_a_layer_are_settings_of_the_server_for_models_whose_layer_it_runs(capsys, tmp_path):
    plan = str(tmp_path / "mtp.json")
    collocated = ["--arch", "collocated", "--tensor", "1"]
    assert main(["solve", "deepseek-v3", "h200:4x8", *collocated, "--mtp", "accepted=0.8", "--out", plan]) == 0
    assert main(["export", plan, "--to", "env"]) == 0
    exported = capsys.readouterr().out
    assert "MOEJAX_SPECULATE=mtp\nMOEJAX_DRAFT_TOKENS=1\n" in exported
    assert "MOEJAX_KV_CACHE_TYPE=float32\n" in exported, "the server keeps no other cache for such a model"
    assert main(["solve", "deepseek-v3.2", "h200:4x8", *collocated, "--mtp", "accepted=0.8", "--out", plan]) == 0
    assert main(["export", plan, "--to", "env"]) == 2
    assert "'deepseek_v32' (planned, not served by this version)" in capsys.readouterr().err
    for wrong in ("drafts=1", "accepted=2", "drafts=0,accepted=0.5"):
        assert main(["solve", "deepseek-v3", "h200:4x8", "--mtp", wrong]) == 2
    assert main(["solve", "mixtral-8x7b", "h100", "--mtp", "accepted=0.8"]) == 2
    assert "no layer that drafts" in capsys.readouterr().err


def test_drafts_by_look_up_need_no_layer_and_are_settings_of_the_server(capsys, tmp_path):
    plan = str(tmp_path / "ngram.json")
    assert main(["solve", "mixtral-8x7b", "h100", "--ngram", "drafts=3,accepted=0.6", "--out", plan]) == 0
    assert main(["export", plan, "--to", "env"]) == 0
    assert "MOEJAX_SPECULATE=ngram\nMOEJAX_DRAFT_TOKENS=3\n" in capsys.readouterr().out
    assert main(["solve", "deepseek-v3", "h200:4x8", "--ngram", "accepted=0.6", "--mtp", "accepted=0.8"]) == 2
    assert "one of them" in capsys.readouterr().err
    assert main(["solve", "mixtral-8x7b", "h100", "--ngram", "drafts=3"]) == 2
    assert "--ngram drafts=3: which share" in capsys.readouterr().err


class Tags(HTMLParser):
    """Counts elements, and checks that each is closed and that none loads anything."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("arch", ["collocated", "disaggregated", "pd"])
def test_a_report_is_one_page_with_every_rank_in_both_maps(capsys, tmp_path, arch):
    plan, html = str(tmp_path / "plan.json"), tmp_path / "report.html"
    assert main(["solve", "qwen3-30b-a3b", "h100:3x4", "--arch", arch, "--out", plan]) == 0
    text(capsys, "report", plan, "--html", str(html))
    tags = Tags()
    tags.feed(html.read_text())
    assert not tags.open
    page = html.read_text()
    assert all(page.count(f"rank {rank}, host") == 2 for rank in range(12))
    for part in ("Where everything is", "Memory of a device", "A step", "What each loss costs", "simulated days"):
        assert part in page
    assert ("served by <code>moejax serve --arch pd" in page) == (arch == "pd")
    assert "`" not in page
    assert page.count("What speed for a user costs") == 1
    assert page.count("a device against") == (2 if arch == "pd" else 1), "a trade-off for either side"
    for side in ("both sides together", "the ranks for prompts", "the ranks for decode"):
        assert (side in page) == (arch == "pd")
    bands = page.count("[outside of what was measured: ")
    assert bands or arch == "collocated"
    assert page.count("pools for prompts and decode; error factor") == (bands if arch == "pd" else 0)
    assert "prefers-color-scheme" in page
