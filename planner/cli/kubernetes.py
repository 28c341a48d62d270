"""Exports of a plan for whoever starts the server: Kubernetes manifests, an environment file, JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

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
from planner.plan.pools import AnyDeployment, PooledDeployment
from planner.plan.shape import POOLS
from planner.solver.servable import (
    check_servable,
    served_cache_format,
    served_pages,
    served_weight_format,
    shards_dense,
    tensor_width,
)

FORMATS = ("k8s", "env", "json")


def export(found: AnyDeployment, to: str, *, image: str = "moejax:latest", name: str = "moejax") -> str:
    """The plan as text in one of FORMATS. Raises InputError for a plan that no server of this version can serve."""
    if to not in FORMATS:
        raise InputError(f"--to {to!r} is none of {', '.join(FORMATS)}")
    if to == "json":
        return (found if isinstance(found, PooledDeployment) else found.plan).to_json() + "\n"
    deployment, chosen = _served(found)
    if to == "env":
        return environment(deployment, chosen)
    if len({place.host for place in deployment.plan.ranks}) > 1:
        return kubernetes_hosts(deployment, chosen, image=image, name=name)
    return kubernetes(deployment, chosen, image=image, name=name)


def _served(found: AnyDeployment) -> tuple[Deployment, dict[str, int | str]]:
    """All ranks of a plan as one server has them, and the settings of that server. Raises InputError as `export`."""
    if not isinstance(found, PooledDeployment):
        check_servable(found)
        return found, settings(found)
    for pool in found.pools().values():
        check_servable(replace(pool, work="all"))
        if pool.shape.arch != "collocated" or pool.workload.state_bytes:
            why = "of a model with layers whose context is a state" if pool.workload.state_bytes else "that attend only"
            raise InputError(f"the plan has pools with ranks {why}, which `moejax serve --arch {POOLS}` does not have.")
    return replace(found.decode, plan=found.whole, work="all"), pool_settings(found)


def pool_settings(found: PooledDeployment) -> dict[str, int | str]:
    """The settings with which `moejax serve` makes this plan of pools. All instances for prompts become one pool; where
    pools differ in their slots, the server chooses the slots of each."""
    instances = [settings(pool) for pool in found.pools().values()]
    *prompts, decode = (len(pool.plan.ranks) for pool in found.pools().values())
    chosen = {
        **instances[-1],
        "ranks": sum(prompts) + decode,
        "arch": POOLS,
        "prefill": sum(prompts),
        "decode": decode,
        "pages_per_rank": min(int(each["pages_per_rank"]) for each in instances),
    }
    if len(instances) > 2 or instances[0].get("slots_per_rank") != chosen.get("slots_per_rank"):
        chosen.pop("slots_per_rank", None)
    return chosen


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


def environment(deployment: Deployment, chosen: Mapping[str, int | str]) -> str:
    """Environment variables of `moejax serve`, for systemd, `docker run --env-file` or a shell."""
    lines = [f"# {deployment.workload.name} on {deployment.cluster.name}, epoch {deployment.plan.epoch}"]
    lines += [f"MOEJAX_{key.upper()}={value}" for key, value in chosen.items()]
    hosts = len({place.host for place in deployment.plan.ranks})
    if hosts > 1:
        lines += [
            f"# Ranks of {hosts} hosts dial in (moejax rank --join). Add MOEJAX_RANK_LISTEN, MOEJAX_RANK_TOKENS and",
            "# MOEJAX_RANK_TLS_CERT with its key: docs/deployment.md.",
            "MOEJAX_LAUNCHER=join",
        ]
    return "\n".join(lines) + "\n"


def kubernetes(deployment: Deployment, chosen: Mapping[str, int | str], *, image: str, name: str) -> str:
    """A LeaderWorkerSet of two servers, each one pod with its ranks and their devices, a Service, and a
    PodDisruptionBudget that keeps one of them.

    Kubernetes replaces pods; ranks within a pod die and come back without it. Hence the liveness probe asks only
    whether the front answers (`/live`), and the readiness probe whether a request can be served (`/health`).
    """
    plan, hardware = deployment.plan, deployment.cluster.hardware
    arguments = serve_arguments(deployment.workload.name, chosen)
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
