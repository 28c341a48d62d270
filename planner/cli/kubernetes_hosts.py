"""Kubernetes manifests of a plan on several hosts: a pod with the front, a host agent's pod on each host, and edges."""

from __future__ import annotations

from collections.abc import Mapping

from planner.cli.kubernetes_edges import EDGE_PORT, edge_arguments, edges
from planner.cli.kubernetes_parts import (
    KEYS_MOUNT,
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
    secret_volume,
    serve_arguments,
    service,
    volumes,
)
from planner.plan.deployment import Deployment

RANK_PORT = 50052
_TLS = "/rank-tls"
_MOUNTS = mounts(rank="/rank", rank_tls=_TLS)
_EDGE_MOUNT = "              - {name: edge, mountPath: /edge, readOnly: true}"
_SECRETS = ("rank", "rank-tls")


def kubernetes_hosts(deployment: Deployment, settings: Mapping[str, int | str], *, image: str, name: str) -> str:
    """A LeaderWorkerSet whose leader is the front and whose workers are hosts of ranks (`moejax rank --join`), a
    Service for the leader, where operators reach it, a Deployment of edges with the Service where clients do, a
    PodDisruptionBudget that lets one pod go at a time, and a NetworkPolicy for the ranks.

    Kubernetes restarts a lost worker, which joins again, without a restart of its group. The leader is ready once the
    ranks have joined, so workers must not wait for it to be ready.
    """
    ranks, hosts = deployment.plan.ranks, {place.host for place in deployment.plan.ranks}
    each = -(-len(ranks) // len(hosts))
    lines = [
        _preparation(len(hosts), name),
        group_head(deployment, name),
        "  replicas: 1",
        "  startupPolicy: LeaderCreated",
        "  leaderWorkerTemplate:",
        f"    size: {len(hosts) + 1}",
        "    restartPolicy: None",
        _front(deployment, settings, image, name),
        _ranks(each, device_limit(deployment.cluster.hardware, each), image, name),
        service(name, f"app: {name}, part: front"),
        edges(image, name, deployment.workload.name),
        disruption_budget(name, "maxUnavailable: 1"),
        _network_policy(name),
    ]
    return "\n".join(lines) + "\n"


def _preparation(hosts: int, name: str) -> str:
    """Comments that say what must be there before."""
    return f"""\
# One server on {hosts} hosts. Before: the keys of callers, a token for ranks, a certificate for the links between.
#   moejax keys add NAME --file keys.json; kubectl create secret generic {name}-keys --from-file=keys.json
#   (umask 077; moejax tokens add pods --file tokens.json > token)
#   kubectl create secret generic {name}-rank --from-file=tokens.json --from-file=token
#   (umask 077; mkdir -p edge && moejax tokens add edges --file edge/tokens.json > edge/token)
#   kubectl create secret generic {name}-edge --from-file=edge/tokens.json --from-file=edge/token
#   a secret {name}-rank-tls with tls.crt, tls.key, ca.crt for *.{name}.NAMESPACE and {name}-front-edges, and a secret
#   {name}-edge-tls of the same authority, for client authentication alone (cert-manager makes such)
# Clients reach the Service {name}-edges, operators (moejax status, apply) the Service {name}-front.
# What ranks exchange (tokens, activations) is not encrypted: a NetworkPolicy keeps it among the front and the ranks."""


def _front(deployment: Deployment, settings: Mapping[str, int | str], image: str, name: str) -> str:
    """The leader's pod."""
    links = [
        "--launcher=join",
        f"--rank-listen=0.0.0.0:{RANK_PORT}",
        "--rank-tokens=/rank/tokens.json",
        f"--rank-tls-cert={_TLS}/tls.crt",
        f"--rank-tls-key={_TLS}/tls.key",
        f"--rank-tls-client-ca={_TLS}/ca.crt",
        *edge_arguments(),
    ]
    lines = [
        "    leaderTemplate:",
        pod_head(f"app: {name}, part: front", 60, SCRAPED),
        container_head("front", image, serve_arguments(deployment.workload.name, settings, *links)),
        container_ports(ranks=RANK_PORT, edges=EDGE_PORT),
        PROBES,
        container_end("16Gi", "", [*_MOUNTS, _EDGE_MOUNT, KEYS_MOUNT]),
        "        volumes:",
        secret_volume(name, "keys"),
        secret_volume(name, "edge"),
        volumes(name, _SECRETS),
    ]
    return "\n".join(lines)


def _ranks(count: int, device: str, image: str, name: str) -> str:
    """A worker's pod: the host agent of `count` ranks."""
    arguments = [
        "rank",
        f"--join=$(LWS_LEADER_ADDRESS):{RANK_PORT}",
        "--token-file=/rank/token",
        "--host=$(NODE_NAME)",
        f"--count={count}",
        f"--ca={_TLS}/ca.crt",
        f"--cert={_TLS}/tls.crt",
        f"--key={_TLS}/tls.key",
    ]
    lines = [
        "    workerTemplate:",
        pod_head(f"app: {name}, part: ranks", 30),
        f"""\
        topologySpreadConstraints:
          - maxSkew: 1
            topologyKey: kubernetes.io/hostname
            whenUnsatisfiable: DoNotSchedule
            labelSelector:
              matchLabels: {{app: {name}, part: ranks}}""",
        container_head("ranks", image, arguments),
        """\
              - name: NODE_NAME
                valueFrom:
                  fieldRef: {fieldPath: spec.nodeName}""",
        container_end("64Gi", device, _MOUNTS),
        "        volumes:",
        volumes(name, _SECRETS),
    ]
    return "\n".join(lines)


def _network_policy(name: str) -> str:
    """A NetworkPolicy by which ranks are reached by the front and one another only, and not by edges, which clients of
    the whole world may reach."""
    return f"""\
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {name}-ranks
spec:
  podSelector:
    matchLabels: {{app: {name}, part: ranks}}
  policyTypes: [Ingress]
  ingress:
    - from:
        - podSelector:
            matchLabels: {{app: {name}}}
            matchExpressions: [{{key: part, operator: In, values: [front, ranks]}}]"""
