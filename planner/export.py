"""A plan for those who start the ranks: Kubernetes manifests, environment files, JSON."""

from __future__ import annotations

from planner.deployment import Deployment
from planner.errors import InputError

FORMATS = ("k8s", "env", "json")


def export(deployment: Deployment, to: str, *, image: str = "moejax:latest", name: str = "moejax") -> str:
    """The plan as text in one of FORMATS."""
    if to not in FORMATS:
        raise InputError(f"--to {to!r} is none of {', '.join(FORMATS)}")
    if to == "json":
        return deployment.plan.to_json() + "\n"
    return environment(deployment) if to == "env" else kubernetes(deployment, image=image, name=name)


def environment(deployment: Deployment) -> str:
    """One line of shell variables per rank, to be sourced or read by a starter."""
    plan = deployment.plan
    lines = [f"# {deployment.workload.name} on {deployment.cluster.name}, epoch {plan.epoch}"]
    for r in plan.ranks:
        lines.append(
            f"MOEJAX_RANK={r.id} MOEJAX_HOST={r.host} MOEJAX_ROLE={r.role} "
            f"MOEJAX_GROUP={r.group} MOEJAX_SLOTS={plan.slots_per_rank} MOEJAX_PAGES={plan.pages_per_rank}"
        )
    return "\n".join(lines) + "\n"


def kubernetes(deployment: Deployment, *, image: str, name: str) -> str:
    """A ConfigMap with the plan, a LeaderWorkerSet (front and one pod per rank) and a Service.

    Pods are not restarted with their group (`restartPolicy: None`): a rank that dies is replaced alone and
    dials in again. One device per pod, ranks of a host kept together, hosts of a rack apart.
    """
    plan, hardware = deployment.plan, deployment.cluster.hardware
    per_host = deployment.cluster.per_host
    resource = "google.com/tpu" if hardware.name.startswith("v") else "nvidia.com/gpu"
    device = "" if hardware.name == "cpu" else f"\n                {resource}: 1"
    serving = [r for r in plan.ranks if r.role != "standby"]
    return f"""\
apiVersion: v1
kind: ConfigMap
metadata:
  name: {name}-plan
data:
  plan.json: |
    {plan.to_json()}
---
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {name}
  annotations:
    moejax.dev/model: "{deployment.workload.name}"
    moejax.dev/cluster: "{deployment.cluster.name}"
    moejax.dev/ranks: "{len(serving)} serving, {len(plan.ranks) - len(serving)} standby, {per_host} per host"
spec:
  replicas: 1
  leaderWorkerTemplate:
    size: {len(plan.ranks) + 1}
    restartPolicy: None
    leaderTemplate:
      metadata:
        labels: {{app: {name}, part: front}}
      spec:
        containers:
          - name: front
            image: {image}
            args: ["serve", "--plan", "/plan/plan.json", "--remote-ranks"]
            ports:
              - {{name: grpc, containerPort: 50051}}
              - {{name: http, containerPort: 8000}}
            readinessProbe:
              grpc: {{port: 50051}}
              periodSeconds: 2
            livenessProbe:
              httpGet: {{path: /live, port: 8000}}
              periodSeconds: 5
            volumeMounts:
              - {{name: plan, mountPath: /plan}}
        volumes:
          - {{name: plan, configMap: {{name: {name}-plan}}}}
    workerTemplate:
      metadata:
        labels: {{app: {name}, part: rank}}
      spec:
        terminationGracePeriodSeconds: 5
        containers:
          - name: rank
            image: {image}
            args: ["rank", "--front", "$(LWS_LEADER_ADDRESS):50052"]
            env:
              - name: MOEJAX_WORKER_INDEX
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']
            resources:
              limits:
                memory: 64Gi{device}
            volumeMounts:
              - {{name: plan, mountPath: /plan}}
              - {{name: store, mountPath: /dev/shm}}
        volumes:
          - {{name: plan, configMap: {{name: {name}-plan}}}}
          - {{name: store, emptyDir: {{medium: Memory}}}}
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  selector: {{app: {name}, part: front}}
  ports:
    - {{name: grpc, port: 50051}}
    - {{name: http, port: 8000}}
"""
