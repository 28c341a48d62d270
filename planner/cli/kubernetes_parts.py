"""Parts that all Kubernetes manifests share, as lines of YAML: pods, containers, services and budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from planner.inputs.cluster import Hardware
from planner.plan.deployment import Deployment

PROBES = """\
            startupProbe:
              httpGet: {path: /live, port: http}
              periodSeconds: 5
              failureThreshold: 240
            readinessProbe:
              httpGet: {path: /health, port: http}
              periodSeconds: 2
            livenessProbe:
              httpGet: {path: /live, port: http}
              periodSeconds: 5
              failureThreshold: 6
            lifecycle:
              preStop:
                exec: {command: [sleep, "5"]}  # the Service has noticed by then: no new connection comes"""
"""Probes of a front's or an edge's container, which opens its ports once a front serves: it is alive while it answers,
and ready while a request can be served. It is asked to end only once the Service sends it nothing more."""
KEYS_MOUNT = "              - {name: keys, mountPath: /keys, readOnly: true}"
SCRAPED = """
        annotations:
          prometheus.io/scrape: "true"
          prometheus.io/port: "8000\""""
"""Annotations of a pod whose metrics are read at the front's HTTP port."""
_SCRATCH_MOUNTS = """\
              - {name: cache, mountPath: /cache}
              - {name: shm, mountPath: /dev/shm}
              - {name: tmp, mountPath: /tmp}"""
_SCRATCH_VOLUMES = """\
          - {name: cache, emptyDir: {}}
          - {name: shm, emptyDir: {medium: Memory, sizeLimit: 16Gi}}
          - {name: tmp, emptyDir: {}}"""


def serve_arguments(model: str, settings: Mapping[str, int | str], *more: str) -> list[str]:
    """The command of a front's container: the model's folder, the callers' keys, `more`, and the plan's settings."""
    flags = (f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in settings.items())
    fixed = [f"--model=/models/{model}", "--host=0.0.0.0", "--api-keys=/keys/keys.json", "--log-format=json"]
    return ["serve", *fixed, *more, *flags]


def group_head(deployment: Deployment, name: str) -> str:
    """The beginning of a LeaderWorkerSet, up to its `spec`."""
    return f"""\
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {name}
  annotations:
    moejax.dev/model: "{deployment.workload.name}"
    moejax.dev/cluster: "{deployment.cluster.name}"
spec:"""


def pod_head(labels: str, grace_s: int, annotations: str = "") -> str:
    """The beginning of a pod: its labels and annotations, its security context, and the seconds that its processes have
    to end."""
    return f"""\
      metadata:
        labels: {{{labels}}}{annotations}
      spec:
        enableServiceLinks: false
        terminationGracePeriodSeconds: {grace_s}
        securityContext:
          runAsNonRoot: true
          runAsUser: 10001
          fsGroup: 10001
          seccompProfile: {{type: RuntimeDefault}}"""


def container_head(name: str, image: str, arguments: Iterable[str]) -> str:
    """The beginning of a pod's container: what it runs, and where that keeps what it compiles."""
    words = "".join(f'\n              - "{word}"' for word in arguments)
    return f"""\
        containers:
          - name: {name}
            image: {image}
            args:{words}
            env:
              - {{name: MOEJAX_CACHE, value: /cache}}"""


def container_ports(**more: int) -> str:
    """The ports of a front's container: those of callers, and `more` by their names."""
    ports = {"grpc": 50051, "http": 8000} | more
    lines = [f"              - {{name: {name}, containerPort: {port}}}" for name, port in ports.items()]
    return "\n".join(["            ports:", *lines])


def container_end(memory: str, device: str, mounts: Iterable[str]) -> str:
    """The end of a container: its security context, its limits (`memory`, and the line of `device_limit`), and its
    mounts after that of the models."""
    return "\n".join(
        [
            f"""\
            securityContext:
              allowPrivilegeEscalation: false
              readOnlyRootFilesystem: true
              capabilities: {{drop: [ALL]}}
            resources:
              limits:
                memory: {memory}{device}
            volumeMounts:
              - {{name: models, mountPath: /models, readOnly: true}}""",
            *mounts,
        ]
    )


def mounts(**read_only: str) -> list[str]:
    """Mounts of a container: paths by the names of their volumes, and the writable scratch mounts."""
    names = {name.replace("_", "-"): path for name, path in read_only.items()}
    lines = [f"              - {{name: {name}, mountPath: {path}, readOnly: true}}" for name, path in names.items()]
    return [*lines, _SCRATCH_MOUNTS]


def volumes(name: str, secrets: Iterable[str]) -> str:
    """Volumes of a pod, without their title: the models, secrets of this server by their names, and scratch."""
    lines = [
        f"          - name: models\n            persistentVolumeClaim: {{claimName: {name}-models, readOnly: true}}"
    ]
    return "\n".join([*lines, *(secret_volume(name, secret) for secret in secrets), _SCRATCH_VOLUMES])


def secret_volume(name: str, secret: str) -> str:
    """A volume with a secret of this server."""
    return f"          - name: {secret}\n            secret: {{secretName: {name}-{secret}, defaultMode: 0440}}"


def device_limit(hardware: Hardware, count: int) -> str:
    """The line of a container's limits for `count` devices; empty on CPUs."""
    resource = "google.com/tpu" if hardware.is_tpu else "nvidia.com/gpu"
    return "" if hardware.name == "cpu" else f"\n                {resource}: {count}"


def service(name: str, labels: str, note: str = "", of: str = "front") -> str:
    """A Service where clients reach the pods that have these labels."""
    return f"""\
---
apiVersion: v1
kind: Service
metadata:
  name: {name}-{of}{note}
spec:
  selector: {{{labels}}}
  ports:
    - {{name: grpc, port: 50051, targetPort: grpc}}
    - {{name: http, port: 8000, targetPort: http}}"""


def disruption_budget(name: str, bound: str) -> str:
    """A PodDisruptionBudget of the server's pods."""
    return f"""\
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {name}
spec:
  {bound}
  selector:
    matchLabels: {{app: {name}}}"""
