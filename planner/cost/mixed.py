"""Predictions for devices of several kinds: requests and expert traffic of each by its speed.

All ranks run the same program, so they have as many slots each, as many as fit on the smallest, and a step takes as
long as the slowest of them. What can follow speed does: a tensor group (the ranks of a host, all of one kind) runs as
many requests as it has time and memory for, and ranks of a faster kind get more of the expert traffic, by the placement
of hot copies (`expert_speeds`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from planner.cost.roofline import StepTime, first_token_time, prefill_time, step_time
from planner.cost.throughput import Candidate, assess, largest_count, token_gap
from planner.inputs.cluster import Cluster
from planner.inputs.engine import engine_of
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.shape import Shape

ROUNDS = 6
TYPICAL = 32
"""Requests of a group at which the speeds of kinds are compared."""


def expert_speeds(workload: Workload, cluster: Cluster, shape: Shape, context: float) -> dict[str, float]:
    """The expert traffic of a rank of each kind over the mean, with which all take as long for their experts."""
    seconds = {kind: step_time(workload, cluster.only(kind), shape, TYPICAL, context).experts for kind in cluster.kinds}
    if not all(seconds.values()):
        return dict.fromkeys(seconds, 1.0)
    counts = Counter(d.kind for d in cluster.devices)
    mean = sum(counts[kind] / each for kind, each in seconds.items()) / len(cluster.devices)
    return {kind: 1 / each / mean for kind, each in seconds.items()}


def rank_speeds(workload: Workload, cluster: Cluster, shape: Shape, context: float) -> np.ndarray:
    """The speed of each expert rank of a shape on the whole cluster over the mean: float [expert ranks]."""
    by_kind = expert_speeds(workload, cluster, shape, context)
    ranks = [d for d, role in zip(cluster.devices, shape.roles, strict=True) if role in ("collocated", "expert")]
    found = np.array([by_kind[d.kind] for d in ranks])
    return found / found.mean()


def group_kinds(cluster: Cluster, shape: Shape) -> Counter[str]:
    """The number of tensor groups of each kind. Of a mesh left after a loss the fastest groups are taken as lost."""
    if len(shape.roles) == len(cluster.devices):
        of = dict(zip(shape.groups, cluster.devices, strict=True))
        return Counter(device.kind for group, device in of.items() if group >= 0)
    order = sorted(cluster.devices, key=lambda d: cluster.kinds[d.kind].memory_bandwidth)
    return Counter(d.kind for d in order[:: shape.tensor][: shape.data])


def assess_kinds(
    workload: Workload, cluster: Cluster, shape: Shape, traffic: Traffic, *, peak: float = 1.0, work: str = "all"
) -> Candidate:
    """As `planner.cost.throughput.assess`, also for devices of several kinds. Prompts that have ranks of their own
    (`work`), and request rates (`traffic.rps`), are those of the slowest kind."""
    slow = assess(workload, cluster, shape, traffic, peak=peak, work=work)
    if not cluster.kinds or work == "prompts" or traffic.rps is not None or slow.step is None or slow.reason:
        return slow
    groups, speeds = group_kinds(cluster, shape), expert_speeds(workload, cluster, shape, traffic.context)
    alone = {kind: assess(workload, cluster.only(kind), shape, _patient(traffic), work=work) for kind in groups}
    prefill = {
        kind: prefill_time(workload, cluster.only(kind), shape, traffic.prompt, peak=peak) if work == "all" else 0.0
        for kind in groups
    }
    share, count = engine_of(cluster.hardware).interference, sum(groups.values())

    def step_of(kind: str, requests: int, mean: float) -> StepTime:
        hot = max(mean, 1.0) / requests * speeds[kind] * peak  # of the rank's experts, over its own requests
        return step_time(workload, cluster.only(kind), shape, requests, traffic.context, peak=hot)

    def gap_of(kind: str, requests: int, mean: float) -> float:
        step = step_of(kind, requests, mean).total / workload.kept
        return token_gap(step, prefill[kind], requests, traffic.output, share)

    requests, mean = dict.fromkeys(groups, slow.requests_per_group), float(slow.requests_per_group)

    def most_of(kind: str, mean: float) -> int:
        """The most requests of a group of a kind that its time and memory allow beside `mean` of others."""
        most = alone[kind].requests_per_group
        return largest_count(most, lambda n: gap_of(kind, n, mean) <= traffic.tpot_ms / 1e3)

    for _ in range(ROUNDS):
        found = {kind: most_of(kind, mean) for kind in groups}
        now = sum(groups[kind] * found[kind] for kind in groups) / count
        if not all(found.values()) or now <= mean:
            break
        requests, mean = found, (now + mean) / 2
    mean = sum(groups[kind] * requests[kind] for kind in groups) / count
    while late := {kind for kind, n in requests.items() if n > 1 and gap_of(kind, n, mean) > traffic.tpot_ms / 1e3}:
        requests = {kind: n - (kind in late) for kind, n in requests.items()}
        mean = sum(groups[kind] * requests[kind] for kind in groups) / count
    steps = {kind: step_of(kind, n, mean) for kind, n in requests.items()}
    last = max(steps, key=lambda kind: steps[kind].total)
    busy = max(steps[last].total / workload.kept + n / traffic.output * prefill[kind] for kind, n in requests.items())
    rate = count * mean / busy
    if rate <= slow.tokens_per_second:
        return slow
    return replace(
        slow,
        requests_per_group=int(mean),
        requests_by_kind=tuple(requests.items()),
        step=steps[last],
        tokens_per_second=rate,
        tokens_per_second_per_user=1 / max(gap_of(kind, n, mean) for kind, n in requests.items()),
        ttft_seconds=first_token_time(workload, cluster, max(prefill.values()), steps[last].total),
    )


def _patient(traffic: Traffic) -> Traffic:
    """The traffic without limits on delays: what fits in memory."""
    return replace(traffic, tpot_ms=1e9, ttft_ms=1e9)
