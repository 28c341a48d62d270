"""Kubernetes manifests of edges as a Deployment of their own, beside the pod with the front."""

from __future__ import annotations

from planner.cli.kubernetes_parts import (
    KEYS_MOUNT,
    PROBES,
    SCRAPED,
    container_end,
    container_head,
    container_ports,
    mounts,
    pod_head,
    secret_volume,
    service,
    volumes,
)

EDGE_PORT = 50053
_TLS = "/edge-tls"
COUNT = 2
"""Edges: one can go while clients connect to the other one."""


def edge_arguments() -> list[str]:
    """Arguments of the front by which edges can connect to it."""
    return [f"--edge-listen=0.0.0.0:{EDGE_PORT}", "--edge-tokens=/edge/tokens.json"]


def edges(image: str, name: str, model: str) -> str:
    """A Deployment of edges, the Service where clients reach them, and the one where they reach the front. The latter
    has the front's address also while the front is not ready: that is when edges look for it. Their certificate is
    their own: clients reach edges, and with the key of the front and the ranks one could pass for either."""
    arguments = [
        "edge",
        f"--front={name}-front-edges:{EDGE_PORT}",
        "--token-file=/edge/token",
        f"--model=/models/{model}",
        f"--ca={_TLS}/ca.crt",
        f"--cert={_TLS}/tls.crt",
        f"--key={_TLS}/tls.key",
        "--host=0.0.0.0",
        "--api-keys=/keys/keys.json",
        "--grace-s=30",
        "--log-format=json",
    ]
    lines = [
        _front_service(name),
        _deployment_head(name),
        _indented_pod(name, image, arguments),
        service(name, f"app: {name}, part: edges", of="edges"),
    ]
    return "\n".join(lines)


def _front_service(name: str) -> str:
    return f"""\
---
apiVersion: v1
kind: Service
metadata:
  name: {name}-front-edges
spec:
  clusterIP: None
  publishNotReadyAddresses: true  # edges look for the front while it is being started
  selector: {{app: {name}, part: front}}
  ports:
    - {{name: edges, port: {EDGE_PORT}, targetPort: edges}}"""


def _deployment_head(name: str) -> str:
    return f"""\
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}-edges
spec:
  replicas: {COUNT}
  selector:
    matchLabels: {{app: {name}, part: edges}}
  strategy:
    rollingUpdate: {{maxUnavailable: 0, maxSurge: 1}}
  template:"""


def _indented_pod(name: str, image: str, arguments: list[str]) -> str:
    """The pod of an edge, which stands two columns to the left of those of a LeaderWorkerSet."""
    spread = f"""\
        topologySpreadConstraints:
          - maxSkew: 1
            topologyKey: kubernetes.io/hostname
            whenUnsatisfiable: ScheduleAnyway
            labelSelector:
              matchLabels: {{app: {name}, part: edges}}"""
    secrets = mounts(edge="/edge", edge_tls=_TLS)
    lines = [
        pod_head(f"app: {name}, part: edges", 60, SCRAPED),
        spread,
        container_head("edge", image, arguments),
        container_ports(),
        PROBES,
        container_end("2Gi", "", [*secrets, KEYS_MOUNT]),
        "        volumes:",
        secret_volume(name, "keys"),
        volumes(name, ["edge", "edge-tls"]),
    ]
    return "\n".join(line.removeprefix("  ") for line in "\n".join(lines).split("\n"))
