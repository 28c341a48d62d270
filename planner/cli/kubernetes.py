"""A plan for those who start the server: Kubernetes manifests, an environment file, JSON."""

from __future__ import annotations

from planner.deployment import Deployment
from planner.errors import InputError
from planner.export_hosts import kubernetes_hosts
from planner.served import check_served, divides_dense, held_form, served_pages, tensor_of

FORMATS = ("k8s", "env", "json")


def export(deployment: Deployment, to: str, *, image: str = "moejax:latest", name: str = "moejax") -> str:
    """The plan as text in one of FORMATS. Raises InputError for a plan that no server of this version can serve."""
    if to not in FORMATS:
        raise InputError(f"--to {to!r} is none of {', '.join(FORMATS)}")
    if to == "json":
        return deployment.plan.to_json() + "\n"
    check_served(deployment)
    if to == "env":
        return environment(deployment)
    if len({place.host for place in deployment.plan.ranks}) > 1:
        return kubernetes_hosts(deployment, settings(deployment), image=image, name=name)
    return kubernetes(deployment, image=image, name=name)


def settings(deployment: Deployment) -> dict[str, int | str]:
    """What `moejax serve` must be told so that it makes this plan."""
    plan = deployment.plan
    some: dict[str, int | str] = {"slots_per_rank": plan.slots_per_rank} if plan.slots_per_rank else {}
    if deployment.shape.arch == "disaggregated":
        some |= {"arch": "disaggregated", "attention": len(plan.source_ids), "experts": len(plan.holder_ids)}
    return {
        "ranks": len(plan.ranks),
        **some,
        "survive": deployment.survive.ranks,
        "data_type": held_form(deployment.workload),
        **({"dense": "divided"} if divides_dense(deployment) else {}),
        **({"tensor": tensor} if (tensor := tensor_of(deployment)) > 1 else {}),
        "page_size": deployment.workload.page_tokens,
        "pages_per_rank": served_pages(deployment),
    }


def environment(deployment: Deployment) -> str:
    """Variables of `moejax serve`, for systemd's EnvironmentFile, `docker run --env-file` or a shell."""
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

    The pod is the unit that Kubernetes replaces; ranks within it die and come back without it. Hence liveness asks
    only whether the front answers (`/live`), and readiness whether a request can be served (`/health`).
    """
    plan, hardware = deployment.plan, deployment.cluster.hardware
    resource = "google.com/tpu" if hardware.name.startswith("v") else "nvidia.com/gpu"
    device = "" if hardware.name == "cpu" else f"\n                {resource}: {len(plan.ranks)}"
    flags = "".join(f'\n              - "--{k.replace("_", "-")}={v}"' for k, v in settings(deployment).items())
    return f"""\
# Keys first: moejax keys add NAME --file keys.json; kubectl create secret generic {name}-keys --from-file=keys.json
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {name}
  annotations:
    moejax.dev/model: "{deployment.workload.name}"
    moejax.dev/cluster: "{deployment.cluster.name}"
spec:
  replicas: 2
  leaderWorkerTemplate:
    size: 1
    workerTemplate:
      metadata:
        labels: {{app: {name}}}
        annotations:
          prometheus.io/scrape: "true"
          prometheus.io/port: "8000"
      spec:
        enableServiceLinks: false
        terminationGracePeriodSeconds: 60
        securityContext:
          runAsNonRoot: true
          runAsUser: 10001
          fsGroup: 10001
          seccompProfile: {{type: RuntimeDefault}}
        containers:
          - name: server
            image: {image}
            args:
              - "serve"
              - "--model=/models/{deployment.workload.name}"
              - "--host=0.0.0.0"
              - "--api-keys=/keys/keys.json"
              - "--log-format=json"{flags}
            env:
              - {{name: MOEJAX_CACHE, value: /cache}}
            ports:
              - {{name: grpc, containerPort: 50051}}
              - {{name: http, containerPort: 8000}}
            startupProbe:
              httpGet: {{path: /live, port: http}}
              periodSeconds: 5
              failureThreshold: 240
            readinessProbe:
              httpGet: {{path: /health, port: http}}
              periodSeconds: 2
            livenessProbe:
              httpGet: {{path: /live, port: http}}
              periodSeconds: 5
              failureThreshold: 6
            securityContext:
              allowPrivilegeEscalation: false
              readOnlyRootFilesystem: true
              capabilities: {{drop: [ALL]}}
            resources:
              limits:
                memory: 64Gi{device}
            volumeMounts:
              - {{name: models, mountPath: /models, readOnly: true}}
              - {{name: keys, mountPath: /keys, readOnly: true}}
              - {{name: cache, mountPath: /cache}}
              - {{name: shm, mountPath: /dev/shm}}
              - {{name: tmp, mountPath: /tmp}}
        volumes:
          - name: models
            persistentVolumeClaim: {{claimName: {name}-models, readOnly: true}}
          - name: keys
            secret: {{secretName: {name}-keys, defaultMode: 0440}}
          - {{name: cache, emptyDir: {{}}}}
          - {{name: shm, emptyDir: {{medium: Memory, sizeLimit: 16Gi}}}}
          - {{name: tmp, emptyDir: {{}}}}
---
apiVersion: v1
kind: Service
metadata:
  name: {name}-front  # LeaderWorkerSet makes a headless one of the name itself
spec:
  selector: {{app: {name}}}
  ports:
    - {{name: grpc, port: 50051, targetPort: grpc}}
    - {{name: http, port: 8000, targetPort: http}}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {name}
spec:
  minAvailable: 1
  selector:
    matchLabels: {{app: {name}}}
"""
