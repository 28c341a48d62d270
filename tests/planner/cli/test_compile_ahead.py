"""Verify compiles the step that moejax runs, for the meshes of the plan, and says what is missing when it cannot."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

from planner import InputError, solve
from planner.cli import compile_ahead as module
from planner.cli.compile_ahead import (
    CompilerUnavailable,
    _run_compiler,
    aot_figures,
    aot_problem,
    compile_ahead,
    meshes,
    topology_devices,
)
from planner.cli.kubernetes import export
from planner.cli.main import main
from planner.cost.design import design
from planner.cost.throughput import assess
from planner.inputs.cluster import Cluster, read_cluster
from planner.inputs.published import MODELS, find_published, read_model, workload_from
from planner.inputs.traffic import Traffic
from planner.plan.deployment import Deployment, FaultTolerance

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (moejax[tpu])")

TINY = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TRAFFIC = Traffic(prompt=32, output=32)


def small(hosts: tuple[str, ...] = ("a", "a", "b", "b"), **config) -> Deployment:
    found = TINY | config
    model = workload_from(found, name="small", cache="float32")
    cluster = Cluster.local(len(hosts), hosts=hosts, memory_bytes=1_600_000)
    made = design(model, cluster, traffic=TRAFFIC, tensor=1, dense=1).deployment
    return replace(made, config=found)


def problem(d: Deployment, topology: str) -> dict:
    best = assess(d.workload, d.cluster, d.shape, d.traffic)
    return aot_problem(d, topology, best, meshes(d, topology, best))


def test_a_topology_is_counted_or_refused():
    assert topology_devices("v5e:2x4") == 8
    assert topology_devices("v5p:2x2x4") == 16
    for wrong in ("v5e", "v5e:2x0"):
        with pytest.raises(InputError, match=wrong):
            topology_devices(wrong)


def test_every_loss_of_the_lattice_is_among_the_meshes():
    d = small()
    best = assess(d.workload, d.cluster, d.shape, d.traffic)
    short = meshes(d, "cpu:4", best)
    assert [(m.name, m.devices) for m in short] == [
        ("all", (0, 1, 2, 3)),
        ("without rank 0 and others alike", (1, 2, 3)),
        ("without a and others alike", (2, 3)),
    ]
    every = meshes(d, "cpu:4", best, each_loss=True)
    assert [m.devices for m in every[1:]] == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (2, 3), (0, 1)]
    for mesh in every:
        assert len(mesh.devices) * mesh.slots >= d.workload.experts
    part = meshes(d, "cpu:3", best)
    assert [(m.name, m.devices, m.slots) for m in part] == [
        ("all", (0, 1, 2), d.plan.slots_per_rank),
        ("without one", (0, 1), d.plan.slots_per_rank),
    ]


def test_a_loss_whose_experts_fit_nowhere_is_not_compiled_and_said():
    d = small(("a", "a", "a", "b"))
    d = replace(d, cluster=replace(d.cluster, hardware=replace(d.cluster.hardware, memory_bytes=600_000)))
    best = assess(d.workload, d.cluster, d.shape, d.traffic)
    by_devices = {m.devices: m for m in meshes(d, "cpu:4", best)}
    assert not by_devices[0, 1, 2, 3].reason
    assert "slots per rank need" in by_devices[3,].reason


@pytest.mark.parametrize("model", ["olmoe-1b-7b", "deepseek-v3", "qwen3-30b-a3b"])
def test_the_problem_has_the_sizes_of_the_plan(model):
    _, config = find_published(model)
    w = read_model(model)
    d = design(w, read_cluster("h200:40x8"), tensor=1, dense=1).deployment
    asked = problem(replace(d, config=config), "v5e:2x4")
    requests = next(f.value for f in d.plan.cost if f.name == "requests_per_group")
    assert asked["rows"] == requests
    assert asked["pages"] * w.page_tokens >= requests * d.traffic.longest
    assert {m["slots"] for m in asked["meshes"]} == {d.plan.slots_per_rank}
    assert [len(m["devices"]) for m in asked["meshes"]] == [8, 7]
    assert asked["weights"] == ("published" if w.weight_format == "fp8" else "bfloat16")


def test_a_plan_that_moejax_does_not_run_is_refused_with_the_way_out():
    w = read_model("olmoe-1b-7b")
    wide = design(w, read_cluster("h100"), tensor=2).deployment
    with pytest.raises(InputError, match=r"queries of all heads at once.*--tensor 1 --dense 1"):
        problem(replace(wide, config=TINY | {"model_type": "olmoe"}), "v5e:2x4")
    with pytest.raises(InputError, match=r"tensor groups of 2: --aot compiles the step of ranks that attend alone"):
        problem(replace(wide, config=TINY), "v5e:2x4")
    apart = design(w, read_cluster("h100"), arch="disaggregated", tensor=1).deployment
    with pytest.raises(InputError, match=r"programs of their own.*--aot compiles the one program of collocated ranks"):
        problem(replace(apart, config=TINY), "v5e:2x4")
    with pytest.raises(InputError, match="there is no model to compile"):
        problem(replace(small(), config={}), "cpu:4")


def with_dense_groups(slots: int) -> Deployment:
    """Two dense layers of three, sharded over four ranks; twelve experts on four ranks of so many slots."""
    qwen = {"num_experts": 12, "moe_intermediate_size": 24, "mlp_only_layers": [0, 1], "model_type": "qwen3_moe"}
    found = {key: value for key, value in TINY.items() if key != "num_local_experts"} | qwen
    model = workload_from(found, name="small", cache="float32")
    cluster = Cluster.local(4, memory_bytes=4_000_000)
    none = FaultTolerance(ranks=0)
    made = design(model, cluster, traffic=TRAFFIC, survive=none, tensor=1, dense=4, slots=slots).deployment
    return replace(made, config=found)


def test_dense_groups_are_served_sharded_where_slots_take_no_more_of_them_than_planned():
    d = with_dense_groups(slots=3)
    assert dict(d.plan.axes)["dense"] == 4
    assert problem(d, "cpu:4")["dense"] == "sharded"
    assert "MOEJAX_DENSE=sharded" in export(d, "env")
    assert problem(small(), "cpu:4")["dense"] == "replicated"
    assert "MOEJAX_DENSE" not in export(small(), "env")
    with pytest.raises(InputError, match=r"dense groups of 4: 0\.25 of each dense layer on a rank.*take 0\.333"):
        problem(with_dense_groups(slots=4), "cpu:4")


@needs_jax
def test_a_step_with_sharded_layers_compiles_over_every_mesh():
    asked = problem(with_dense_groups(slots=3), "cpu:4")
    first, second = (_run_compiler(asked | {"dense": how}, 600)["meshes"][0] for how in ("sharded", "replicated"))
    assert "error" not in first
    assert "error" not in second
    assert first["argument_bytes"] < second["argument_bytes"]


@needs_jax
def test_the_step_that_moejax_runs_compiles_over_every_mesh_here():
    d = small()
    found = compile_ahead(d, "cpu:4")
    assert [row["devices"] for row in found["meshes"]] == [4, 3, 2]
    for row in found["meshes"]:
        assert row["source"] == "aot"
        # Weights and cache are what the plan says they are; a step adds its activations.
        assert row["argument_bytes"] == pytest.approx(row["planned_bytes"], rel=0.25)
    slots = {row["slots"] for row in found["meshes"]}
    assert len(slots) == 1 or found["meshes"][-1]["argument_bytes"] > found["meshes"][0]["argument_bytes"]
    assert {f.source for f in aot_figures(found)} == {"aot"}


@needs_jax
def test_the_plan_of_a_running_server_compiles_with_the_configuration_it_carries():
    workload = read_model(str(MODELS / "plain" / "tiny.json"))
    cluster = Cluster.local(2)
    d = Deployment(
        plan=solve(workload, cluster, pages_per_rank=8),
        workload=workload,
        cluster=cluster,
        traffic=Traffic(prompt=32, output=32, tpot_ms=1e9, ttft_ms=1e9, rps=1),
        config=json.loads((MODELS.parents[1] / "models" / "tiny" / "config.json").read_text()),
    )
    whole, last = compile_ahead(d, "cpu:2")["meshes"]
    assert (whole["devices"], last["devices"]) == (2, 1)
    assert whole["argument_bytes"] == pytest.approx(whole["planned_bytes"], rel=0.05)


@needs_jax
def test_a_family_that_is_not_served_is_refused_by_name():
    _, config = find_published("qwen3-30b-a3b")
    with pytest.raises(InputError, match=r"jamba.*not served"):
        compile_ahead(replace(small(), config={**config, "model_type": "jamba"}), "cpu:4")


@needs_jax
@needs_libtpu
def test_the_step_compiles_for_tpus_that_are_not_here_with_the_compilers_own_seconds():
    d = small(("a",) * 4)
    found = compile_ahead(d, "v5e:2x2")
    assert [row["devices"] for row in found["meshes"]] == [4, 3]
    for row in found["meshes"]:
        assert row["seconds"]["attention"] > 0
        assert row["seconds"]["experts"] > 0
        assert row["exchanges"] == 2 * d.workload.moe_layers
        assert row["unknown_loops"] == 0


@needs_jax
def test_a_topology_without_its_compiler_says_what_to_install():
    with pytest.raises(CompilerUnavailable, match=r"no compiler for 'v99z:2x2' here.*pip install -e '\.\[tpu\]'"):
        compile_ahead(small(), "v99z:2x2")


def test_without_jax_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "PROGRAM", "moejax.no_such_program")
    with pytest.raises(CompilerUnavailable, match=r"No module named .*pip install -e '\.\[tpu\]'"):
        compile_ahead(small(), "cpu:4")


@needs_jax
def test_the_plan_file_takes_the_figures_of_the_compiler(tmp_path, capsys):
    plan, out = tmp_path / "plan.json", tmp_path / "out.json"
    plan.write_text(small().to_json())
    assert main(["verify", str(plan), "--aot", "cpu:4", "--out", str(out), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["aot"]["meshes"]) == 3
    figures = Deployment.from_json(out.read_text()).plan.cost
    assert {f.source for f in figures} == {"estimate", "aot"}
