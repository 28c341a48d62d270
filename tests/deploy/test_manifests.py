"""Flags, variables, paths and probes of the manifests exist in the server."""

import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import yaml

import planner.cli.main
from planner.cli import kubernetes, kubernetes_parts
from planner.plan.deployment import read_deployment
from planner.plan.pools import PooledDeployment, read_any_deployment
from planner.solver.servable import SERVED_REQUESTS
from serving.api.http.server import application
from serving.cli import keys, local, main
from serving.config import Settings
from serving.launch.edge_processes import END_S
from tests.planner.cli.test_main import plan_file  # noqa: F401  (a fixture)

DEPLOY = Path(__file__).parents[2] / "deploy"


def manifests() -> dict:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def pod() -> dict:
    return manifests()["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]


def given(arguments: list[str]) -> Settings:
    """The settings that `moejax serve` makes of a command line."""
    command = main.main.commands[arguments[0]]
    context = command.make_context("serve", arguments[1:])
    flags = {name: value for name, value in context.params.items() if name not in ("config", "show_settings")}
    return Settings.load(None, {}, **flags)


def test_the_servers_arguments_are_flags_it_knows():
    settings = given(pod()["containers"][0]["args"])
    assert (settings.ranks, settings.host, settings.api_keys) == (8, "0.0.0.0", "/keys/keys.json")


def test_probes_ask_for_paths_that_are_there_and_never_end_a_server_that_recovers(processor):
    routes = {route.path for route in application(processor).routes}
    container = pod()["containers"][0]
    paths = {probe: container[probe]["httpGet"]["path"] for probe in container if probe.endswith("Probe")}
    assert paths == {"startupProbe": "/live", "readinessProbe": "/health", "livenessProbe": "/live"}
    assert set(paths.values()) <= routes
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > Settings().start_timeout_s


def test_ports_selectors_and_volumes_fit_together():
    found, container = manifests(), pod()["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": Settings().grpc_port, "http": Settings().http_port}
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} == set(ports)
    labels = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["workerTemplate"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}
    assert pod()["terminationGracePeriodSeconds"] > Settings().grace_s


def test_a_pod_that_is_to_end_gets_nothing_more_and_has_the_time_to_finish_what_it_has():
    found, container = pod(), pod()["containers"][0]
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (command, float(seconds)) == ("sleep", 5.0)
    assert container["readinessProbe"]["periodSeconds"] < float(seconds)
    assert float(seconds) + Settings().grace_s + END_S < found["terminationGracePeriodSeconds"]


def exported(path: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The variables that the export of a plan file has."""
    capsys.readouterr()
    assert planner.cli.main.main(["export", path, "--to", "env"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_an_exported_environment_is_one_the_server_takes(plan_file, capsys):  # noqa: F811
    variables = exported(plan_file, capsys)
    settings = Settings.load(None, variables)
    assert (settings.ranks, settings.data_type) == (8, "bfloat16")
    planned = read_deployment(plan_file).plan.pages_per_rank
    assert (settings.pages_per_rank, settings.kv_cache_type) == (planned, "bfloat16")
    assert len(variables) == 7


def test_a_plan_of_attention_and_expert_ranks_is_exported_as_one_the_server_makes(capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    words = ["solve", "olmoe-1b-7b", "h100", "--arch", "disaggregated", "--tensor", "1", "--out", path]
    assert planner.cli.main.main(words) == 0
    settings = Settings.load(None, exported(path, capsys))
    plan = read_deployment(path).plan
    assert (settings.arch, settings.attention) == ("disaggregated", len(plan.attention_rank_ids))
    assert (settings.attention or 0) + (settings.experts or 0) == settings.ranks == 8


@pytest.mark.parametrize(
    ("weights", "expected"), [((), ("published", True)), (("--weights", "bfloat16"), ("bfloat16", False))]
)
def test_experts_published_in_int4_are_exported_as_they_are_published(weights, expected, capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    words = ["solve", "kimi-k2.5", "h200:8x8", "--tensor", "1", "--dense", "1", *weights, "--out", path]
    assert planner.cli.main.main(words) == 0
    variables = exported(path, capsys)
    assert variables.pop("MOEJAX_LAUNCHER") == "join"  # takes settings of its own
    settings = Settings.load(None, variables)
    assert (settings.data_type, settings.in_place) == expected
    of_pod = given(kubernetes_parts.serve_arguments("kimi-k2.5", kubernetes.settings(read_deployment(path))))
    assert (of_pod.data_type, of_pod.in_place) == expected


def test_a_plan_of_pools_is_exported_as_settings_of_one_server(capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    assert planner.cli.main.main(["solve", "qwen3-30b-a3b", "h100:3x4", "--arch", "pd", "--out", path]) == 0
    variables = exported(path, capsys)
    assert variables.pop("MOEJAX_LAUNCHER") == "join"  # takes settings of its own
    settings = Settings.load(None, variables)
    assert (settings.arch, (settings.prefill or 0) + (settings.decode or 0)) == ("pd", settings.ranks)
    found = read_any_deployment(path)
    assert isinstance(found, PooledDeployment)
    of_pod = given(kubernetes_parts.serve_arguments("qwen3-30b-a3b", kubernetes.pool_settings(found)))
    assert (of_pod.prefill, of_pod.decode) == (settings.prefill, settings.decode)


def test_the_planner_leaves_room_for_the_states_of_the_requests_that_a_server_runs():
    assert max(decode for decode, _ in Settings().buckets) == SERVED_REQUESTS


def test_a_plan_that_the_server_does_not_make_is_not_exported(capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    assert planner.cli.main.main(["solve", "olmoe-1b-7b", "h100", "--tensor", "2", "--out", path]) == 0
    for to in ("k8s", "env"):
        assert planner.cli.main.main(["export", path, "--to", to]) == 2
        assert "tensor groups of 2" in capsys.readouterr().err
    assert planner.cli.main.main(["export", path, "--to", "json"]) == 0


def test_the_sample_settings_are_settings():
    assert Settings.load(DEPLOY / "moejax.toml", {}).log_format == "json"


def test_the_image_starts_a_command_that_is_there():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    command = next(line for line in lines if line.startswith("CMD")).removeprefix("CMD ")
    assert given(yaml.safe_load(command)).host == "0.0.0.0"
    for source in (line.split()[1:-1] for line in lines if line.startswith("COPY")):
        assert all((DEPLOY.parent / name).exists() for name in source)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize(("name", "command"), [("moejax", "serve --config"), ("moejax-rank", "rank --join")])
def test_systemd_takes_the_unit(tmp_path, name, command):
    unit = (DEPLOY / f"{name}.service").read_text()
    assert f"moejax {command}" in unit
    checked = tmp_path / f"{name}.service"
    checked.write_text(unit.replace("/opt/moejax/.venv/bin/moejax", shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", checked], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if checked.name in line]
    assert said == []


def test_the_variables_of_the_unit_for_hosts_are_those_the_command_reads():
    unit = (DEPLOY / "moejax-rank.service").read_text()
    variables = {name for parameter in main.main.commands["rank"].params for name in _variables(parameter)}
    assert set(re.findall(r"\b(MOEJAX_\w+)=", unit)) - {"MOEJAX_CACHE"} == variables


def _variables(parameter: click.Parameter) -> list[str]:
    found = parameter.envvar or []
    return [found] if isinstance(found, str) else list(found)


def test_commands_of_an_operator_are_in_the_command_line():
    assert {keys.keys, local.doctor, local.completion} <= set(main.main.commands.values())
