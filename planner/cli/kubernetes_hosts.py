"""A plan that spans several hosts, for Kubernetes: a pod with the front, and one on each host that keeps its ranks."""

from __future__ import annotations

from collections.abc import Mapping

from planner.deployment import Deployment

RANK_PORT = 50052
_TLS = "/rank-tls"


def kubernetes_hosts(deployment: Deployment, settings: Mapping[str, int | str], *, image: str, name: str) -> str:
    """A LeaderWorkerSet whose leader is the front and whose workers are hosts of ranks (`moejax rank --join`), a
    Service for the leader, a PodDisruptionBudget that lets one pod go at a time, and a NetworkPolicy for the ranks.

    A worker that is gone is started anew by Kubernetes and joins again; its group is not restarted for that. The leader
    is ready when the ranks are there, so workers must not wait for it to be ready.
    """
    plan, hardware = deployment.plan, deployment.cluster.hardware
    hosts = {place.host for place in plan.ranks}
    each = -(-len(plan.ranks) // len(hosts))
    resource = "google.com/tpu" if hardware.name.startswith("v") else "nvidia.com/gpu"
    device = "" if hardware.name == "cpu" else f"\n                {resource}: {each}"
    front = [
        "serve",
        f"--model=/models/{deployment.workload.name}",
        "--host=0.0.0.0",
        "--api-keys=/keys/keys.json",
        "--log-format=json",
        "--launcher=join",
        f"--rank-listen=0.0.0.0:{RANK_PORT}",
        "--rank-tokens=/rank/tokens.json",
        f"--rank-tls-cert={_TLS}/tls.crt",
        f"--rank-tls-key={_TLS}/tls.key",
        f"--rank-tls-client-ca={_TLS}/ca.crt",
        *(f"--{key.replace('_', '-')}={value}" for key, value in settings.items()),
    ]
    rank = [
        "rank",
        f"--join=$(LWS_LEADER_ADDRESS):{RANK_PORT}",
        "--token-file=/rank/token",
        "--host=$(NODE_NAME)",
        f"--count={each}",
        f"--ca={_TLS}/ca.crt",
        f"--cert={_TLS}/tls.crt",
        f"--key={_TLS}/tls.key",
    ]
    return f"""\
# One server on {len(hosts)} hosts. Before: the keys of callers, a token for ranks, a certificate for the links between.
#   moejax keys add NAME --file keys.json; kubectl create secret generic {name}-keys --from-file=keys.json
#   (umask 077; moejax tokens add pods --file tokens.json > token)
#   kubectl create secret generic {name}-rank --from-file=tokens.json --from-file=token
#   a secret {name}-rank-tls with tls.crt, tls.key, ca.crt for *.{name}.NAMESPACE (cert-manager makes such)
# What ranks exchange (tokens, activations) is not encrypted: a NetworkPolicy keeps it among these pods.
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {name}
  annotations:
    moejax.dev/model: "{deployment.workload.name}"
    moejax.dev/cluster: "{deployment.cluster.name}"
spec:
  replicas: 1
  startupPolicy: LeaderCreated
  leaderWorkerTemplate:
    size: {len(hosts) + 1}
    restartPolicy: None
    leaderTemplate:
      metadata:
        labels: {{app: {name}, part: front}}
        annotations:
          prometheus.io/scrape: "true"
          prometheus.io/port: "8000"
      spec:
{_pod(60)}
        containers:
          - name: front
            image: {image}
            args:{_words(front)}
            env:
              - {{name: MOEJAX_CACHE, value: /cache}}
            ports:
              - {{name: grpc, containerPort: 50051}}
              - {{name: http, containerPort: 8000}}
              - {{name: ranks, containerPort: {RANK_PORT}}}
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
{_container("16Gi", "")}
              - {{name: keys, mountPath: /keys, readOnly: true}}
        volumes:
          - name: keys
            secret: {{secretName: {name}-keys, defaultMode: 0440}}
{_volumes(name)}
    workerTemplate:
      metadata:
        labels: {{app: {name}, part: ranks}}
      spec:
{_pod(30)}
        topologySpreadConstraints:
          - maxSkew: 1
            topologyKey: kubernetes.io/hostname
            whenUnsatisfiable: DoNotSchedule
            labelSelector:
              matchLabels: {{app: {name}, part: ranks}}
        containers:
          - name: ranks
            image: {image}
            args:{_words(rank)}
            env:
              - {{name: MOEJAX_CACHE, value: /cache}}
              - name: NODE_NAME
                valueFrom:
                  fieldRef: {{fieldPath: spec.nodeName}}
{_container("64Gi", device)}
        volumes:
{_volumes(name)}
---
apiVersion: v1
kind: Service
metadata:
  name: {name}-front
spec:
  selector: {{app: {name}, part: front}}
  ports:
    - {{name: grpc, port: 50051, targetPort: grpc}}
    - {{name: http, port: 8000, targetPort: http}}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {name}
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {{app: {name}}}
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
"""


def _words(words: list[str]) -> str:
    return "".join(f'\n              - "{word}"' for word in words)


def _pod(grace_s: int) -> str:
    return f"""\
        enableServiceLinks: false
        terminationGracePeriodSeconds: {grace_s}
        securityContext:
          runAsNonRoot: true
          runAsUser: 10001
          fsGroup: 10001
          seccompProfile: {{type: RuntimeDefault}}"""


def _container(memory: str, device: str) -> str:
    return f"""\
            securityContext:
              allowPrivilegeEscalation: false
              readOnlyRootFilesystem: true
              capabilities: {{drop: [ALL]}}
            resources:
              limits:
                memory: {memory}{device}
            volumeMounts:
              - {{name: models, mountPath: /models, readOnly: true}}
              - {{name: rank, mountPath: /rank, readOnly: true}}
              - {{name: rank-tls, mountPath: {_TLS}, readOnly: true}}
              - {{name: cache, mountPath: /cache}}
              - {{name: shm, mountPath: /dev/shm}}
              - {{name: tmp, mountPath: /tmp}}"""


def _volumes(name: str) -> str:
    return f"""\
          - name: models
            persistentVolumeClaim: {{claimName: {name}-models, readOnly: true}}
          - name: rank
            secret: {{secretName: {name}-rank, defaultMode: 0440}}
          - name: rank-tls
            secret: {{secretName: {name}-rank-tls, defaultMode: 0440}}
          - {{name: cache, emptyDir: {{}}}}
          - {{name: shm, emptyDir: {{medium: Memory, sizeLimit: 16Gi}}}}
          - {{name: tmp, emptyDir: {{}}}}"""
