"""Exports of a plan for whoever starts the server: Kubernetes manifests, an environment file, JSON."""

from __future__ import annotations

from planner.cli.kubernetes_hosts import kubernetes_hosts
from planner.cli.kubernetes_parts import (
    PROBES,
    SCRAPED,
    container_end,
    container_head,
    container_ports,
    device_limit,
    disruption_budget,
    group_head,
    mounts,
    pod_head,
    serve_arguments,
    service,
    volumes,
)
from planner.errors import InputError
from planner.plan.deployment import Deployment
from planner.solver.servable import (
    check_servable,
    served_cache_format,
    served_pages,
    served_weight_format,
    shards_dense,
    tensor_width,
)

FORMATS = ("k8s", "env", "json")


def export(deployment: Deployment, to: str, *, image: str = "moejax:latest", name: str = "moejax") -> str:
    """The plan as text in one of FORMATS. Raises InputError for a plan that no server of this version can serve."""
    if to not in FORMATS:
        raise InputError(f"--to {to!r} is none of {', '.join(FORMATS)}")
    if to == "json":
        return deployment.plan.to_json() + "\n"
    check_servable(deployment)
    if to == "env":
        return environment(deployment)
    if len({place.host for place in deployment.plan.ranks}) > 1:
        return kubernetes_hosts(deployment, settings(deployment), image=image, name=name)
    return kubernetes(deployment, image=image, name=name)


def settings(deployment: Deployment) -> dict[str, int | str]:
    """The settings with which `moejax serve` makes this plan."""
    plan = deployment.plan
    some: dict[str, int | str] = {"slots_per_rank": plan.slots_per_rank} if plan.slots_per_rank else {}
    if deployment.shape.arch == "disaggregated":
        some |= {
            "arch": "disaggregated",
            "attention": len(plan.attention_rank_ids),
            "experts": len(plan.expert_rank_ids),
        }
    held = served_weight_format(deployment)
    weights = {"data_type": "published", "in_place": True} if held == "published" else {"data_type": held}
    return {
        "ranks": len(plan.ranks),
        **some,
        "survive": deployment.survive.ranks,
        **weights,
        **({"dense": "sharded"} if shards_dense(deployment) else {}),
        **_drafts(deployment),
        **({"tensor": tensor} if (tensor := tensor_width(deployment)) > 1 else {}),
        "kv_cache_type": served_cache_format(deployment),
        "page_size": deployment.workload.page_tokens,
        "pages_per_rank": served_pages(deployment),
    }


def _drafts(deployment: Deployment) -> dict[str, int | str]:
    w = deployment.workload
    return {"speculate": "mtp" if w.draft_layers else "ngram", "draft_tokens": w.drafts} if w.drafts else {}


def environment(deployment: Deployment) -> str:
    """Environment variables of `moejax serve`, for systemd, `docker run --env-file` or a shell."""
    lines = [f"# {deployment.workload.name} on {deployment.cluster.name}, epoch {deployment.plan.epoch}"]
    lines += [f"MOEJAX_{key.upper()}={value}" for key, value in settings(deployment).items()]
    hosts = len({place.host for place in deployment.plan.ranks})
    if hosts > 1:
        lines += [
            f"# Ranks of {hosts} hosts dial in (moejax rank --join). Add MOEJAX_RANK_LISTEN, MOEJAX_RANK_TOKENS and",
            "# MOEJAX_RANK_TLS_CERT with its key: docs/deployment.md.",
            "MOEJAX_LAUNCHER=join",
        ]
    return "\n".join(lines) + "\n"


def kubernetes(deployment: Deployment, *, image: str, name: str) -> str:
    """A LeaderWorkerSet of two servers, each one pod with its ranks and their devices, a Service, and a
    PodDisruptionBudget that keeps one of them.

    Kubernetes replaces pods; ranks within a pod die and come back without it. Hence the liveness probe asks only
    whether the front answers (`/live`), and the readiness probe whether a request can be served (`/health`).
    """
    plan, hardware = deployment.plan, deployment.cluster.hardware
    arguments = serve_arguments(deployment.workload.name, settings(deployment))
    lines = [
        "# Keys first: moejax keys add NAME --file keys.json; "
        f"kubectl create secret generic {name}-keys --from-file=keys.json",
        group_head(deployment, name),
        "  replicas: 2",
        "  leaderWorkerTemplate:",
        "    size: 1",
        "    workerTemplate:",
        pod_head(f"app: {name}", 60, SCRAPED),
        container_head("server", image, arguments),
        container_ports(),
        PROBES,
        container_end("64Gi", device_limit(hardware, len(plan.ranks)), mounts(keys="/keys")),
        "        volumes:",
        volumes(name, ["keys"]),
        service(name, f"app: {name}", "  # LeaderWorkerSet makes a headless one of the name itself"),
        disruption_budget(name, "minAvailable: 1"),
    ]
    return "\n".join(lines) + "\n"
