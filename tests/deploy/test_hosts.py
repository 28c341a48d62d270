"""The manifests of a server on several hosts: the commands of the pods are commands of moejax with known options."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import planner.cli.main
from serving.cli import main
from serving.config import Settings
from tests.deploy.test_manifests import given

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifests that the documented commands write for a plan on two hosts of eight."""
    folder = tmp_path_factory.mktemp("plan")
    plan = str(folder / "plan.json")
    solve = ["solve", "qwen3-30b-a3b", "h100:2x8", "--survive", "hosts=1", "--out", plan]
    assert planner.cli.main.main(solve) == 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert planner.cli.main.main(["export", plan, "--to", "k8s"]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def found(exported: str) -> dict[str, Any]:
    each_of = list(yaml.safe_load_all(exported))
    services = {each["metadata"]["name"]: each for each in each_of if each["kind"] == "Service"}
    return {each["kind"]: each for each in each_of} | services


@pytest.fixture(scope="module")
def group(found: dict[str, Any]) -> dict[str, Any]:
    return found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]


def container(group: dict[str, Any], part: str) -> dict[str, Any]:
    return group[part]["spec"]["containers"][0]


def options(arguments: list[str]) -> dict[str, Any]:
    """The options that `moejax rank` or `edge` parses from a command line; it does not check that files exist."""
    command = main.main.commands[arguments[0]]
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type.exists = False
    return command.make_context(arguments[0], arguments[1:]).params


def test_the_file_in_deploy_is_what_the_planner_exports(exported):
    assert (DEPLOY / "kubernetes-hosts.yaml").read_text() == exported


def test_the_front_waits_for_as_many_ranks_as_the_workers_keep_places_for(group):
    settings = given(container(group, "leaderTemplate")["args"])
    rank = options(container(group, "workerTemplate")["args"])
    workers = group["size"] - 1
    assert settings.launcher == "join"
    assert settings.ranks == workers * rank["count"] == 16
    assert container(group, "workerTemplate")["resources"]["limits"]["nvidia.com/gpu"] == rank["count"]
    assert "nvidia.com/gpu" not in container(group, "leaderTemplate")["resources"]["limits"]


def test_workers_dial_the_port_that_the_front_opens_with_papers_it_asks_for(group):
    settings = given(container(group, "leaderTemplate")["args"])
    rank = options(container(group, "workerTemplate")["args"])
    port = settings.rank_listen.rpartition(":")[2]
    assert rank["join"] == f"$(LWS_LEADER_ADDRESS):{port}"
    assert int(port) in {each["containerPort"] for each in container(group, "leaderTemplate")["ports"]}
    assert None not in (
        settings.rank_tls_cert,
        settings.rank_tls_key,
        settings.rank_tls_client_ca,
        settings.rank_tokens,
    )
    assert None not in (rank["ca"], rank["cert"], rank["key"])
    assert rank["plaintext"] is settings.rank_plaintext is False
    given_variables = {each["name"] for each in container(group, "workerTemplate")["env"]}
    assert set(re.findall(r"\$\((\w+)\)", rank["host"])) <= given_variables


def test_every_file_that_is_named_is_mounted(found, group):
    for pod in (group["leaderTemplate"], group["workerTemplate"], found["Deployment"]["spec"]["template"]):
        [of_pod] = pod["spec"]["containers"]
        mounts = {each["mountPath"]: each["name"] for each in of_pod["volumeMounts"]}
        volumes = {each["name"] for each in pod["spec"]["volumes"]}
        assert set(mounts.values()) == volumes
        for path in re.findall(r"=(/\S+)", " ".join(of_pod["args"])):
            assert any(path.startswith(f"{mount}/") for mount in mounts), path


def test_a_rank_or_a_host_that_dies_restarts_nothing_else(found, group):
    assert group["restartPolicy"] == "None"  # else the whole group goes with any of its pods
    assert found["LeaderWorkerSet"]["spec"]["startupPolicy"] == "LeaderCreated"  # it is ready when its ranks are there
    probes = {probe: container(group, "leaderTemplate")[probe] for probe in ("startupProbe", "livenessProbe")}
    assert {probe["httpGet"]["path"] for probe in probes.values()} == {"/live"}
    startup = probes["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > Settings().start_timeout_s
    assert not any(name.endswith("Probe") for name in container(group, "workerTemplate"))
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def test_edges_find_the_front_and_clients_find_edges_that_are_ready(found, group):
    settings, deployment = given(container(group, "leaderTemplate")["args"]), found["Deployment"]
    pod = deployment["spec"]["template"]
    [edge] = pod["spec"]["containers"]
    parsed = options(edge["args"])
    service, _, port = parsed["front"].rpartition(":")
    assert settings.edge_listen == f"0.0.0.0:{port}"
    assert settings.edges >= 1, "the front's own probes need an edge beside it"
    assert settings.edge_tokens
    assert settings.edge_tokens != settings.rank_tokens
    assert None not in (parsed["ca"], parsed["cert"], parsed["key"])
    towards = found[service]["spec"]
    assert towards["selector"] == group["leaderTemplate"]["metadata"]["labels"]
    assert towards["publishNotReadyAddresses"], "a front that recovers is not ready, and edges look for it then"
    names = {each["name"]: each["containerPort"] for each in container(group, "leaderTemplate")["ports"]}
    assert [(names[each["targetPort"]], each["port"]) for each in towards["ports"]] == [(int(port), int(port))]
    labels = pod["metadata"]["labels"]
    assert found["moejax-edges"]["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert deployment["spec"]["replicas"] >= 2
    assert edge["readinessProbe"]["httpGet"]["path"] == "/health"
    assert edge["livenessProbe"]["httpGet"]["path"] == "/live"
    command, seconds = edge["lifecycle"]["preStop"]["exec"]["command"]
    assert (command, edge["readinessProbe"]["periodSeconds"] < float(seconds)) == ("sleep", True)
    assert float(seconds) + float(parsed["grace_s"]) < pod["spec"]["terminationGracePeriodSeconds"]


def test_operators_reach_the_front_and_only_the_front_and_ranks_reach_ranks(found, group):
    labels = {part: group[part]["metadata"]["labels"] for part in ("leaderTemplate", "workerTemplate")}
    assert found["moejax-front"]["spec"]["selector"] == labels["leaderTemplate"]
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels["workerTemplate"]
    let_in = policy["ingress"][0]["from"][0]["podSelector"]
    [parts] = let_in["matchExpressions"]
    assert (parts["key"], parts["operator"]) == ("part", "In")

    def is_let_in(each: dict[str, str]) -> bool:
        return let_in["matchLabels"].items() <= each.items() and each["part"] in parts["values"]

    assert all(is_let_in(each) for each in labels.values())
    assert not is_let_in(found["Deployment"]["spec"]["template"]["metadata"]["labels"])
