"""Predictions for devices of several kinds: requests and expert traffic of each by its speed.

All ranks run the same program, so they have as many slots each, as many as fit on the smallest, and a step takes as
long as the slowest of them. What can follow speed does: a tensor group (the ranks of a host, all of one kind) runs as
many requests as it has time and memory for, and ranks of a faster kind get more of the expert traffic
(`expert_speeds`): they fill more of their slots (`planner.solver.placement.slots_by_speed`), with hotter copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np

from planner.cost.roofline import StepTime, first_token_time, prefill_time, step_time
from planner.cost.throughput import (
    Candidate,
    assess,
    cache_in_use,
    largest_count,
    requests_that_fit,
    token_gap,
)
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


def placement_speeds(workload: Workload, cluster: Cluster, shape: Shape, context: float) -> np.ndarray | None:
    """`rank_speeds` where they differ: None for devices of one kind and for models without experts."""
    return rank_speeds(workload, cluster, shape, context) if cluster.kinds and workload.experts else None


def group_kinds(cluster: Cluster, shape: Shape) -> Counter[str]:
    """The number of tensor groups of each kind. Of a mesh left after a loss the fastest groups are taken as lost."""
    if len(shape.groups) == len(cluster.devices):
        of = dict(zip(shape.groups, cluster.devices, strict=True))
        return Counter(device.kind for group, device in of.items() if group >= 0)
    order = sorted(cluster.devices, key=lambda d: cluster.kinds[d.kind].memory_bandwidth)
    return Counter(d.kind for d in order[:: shape.tensor][: shape.data])


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The tensor groups of each kind of devices on a shape, and the seconds that requests on them take.

    `requests` are those of a group of a kind, `mean` those of a group over all kinds.
    """

    workload: Workload
    cluster: Cluster
    shape: Shape
    traffic: Traffic
    peak: float
    work: str

    @cached_property
    def counts(self) -> Counter[str]:
        """The number of groups of each kind."""
        return group_kinds(self.cluster, self.shape)

    @cached_property
    def speeds(self) -> dict[str, float]:
        """The expert traffic of a rank of each kind over the mean."""
        return expert_speeds(self.workload, self.cluster, self.shape, self.traffic.context)

    @cached_property
    def prefill(self) -> dict[str, float]:
        """The seconds of a prompt on a group of each kind; 0 where prompts are computed elsewhere."""
        w, shape, traffic = self.workload, self.shape, self.traffic
        if self.work != "all":
            return dict.fromkeys(self.counts, 0.0)
        return {
            kind: prefill_time(w, self.cluster.only(kind), shape, traffic.prompt, known=traffic.known, peak=self.peak)
            for kind in self.counts
        }

    def step(self, kind: str, requests: int, mean: float) -> StepTime:
        """A step of the ranks of a kind."""
        hot = max(mean, 1.0) / requests * self.speeds[kind] * self.peak  # of the rank's experts, over its own requests
        hardware, context = self.cluster.only(kind), self.traffic.context
        return step_time(self.workload, hardware, self.shape, requests, context, peak=hot)

    def gap(self, kind: str, requests: int, mean: float) -> float:
        """Seconds between two tokens of a stream on the ranks of a kind."""
        step = self.step(kind, requests, mean).total / self.workload.kept
        return token_gap(step, self.prefill[kind], requests, self.traffic.output, engine_of(self.cluster.hardware))

    def first_token(self, kind: str, requests: int, mean: float) -> float:
        """Seconds until a first token while steps take as long as those of a kind."""
        step = self.step(kind, requests, mean).total
        return first_token_time(self.workload, self.cluster, max(self.prefill.values()), step, requests - 1)

    def keeps(self, kind: str, requests: int, mean: float) -> bool:
        """Whether the ranks of a kind keep the delays of the traffic."""
        t = self.traffic
        in_time = self.gap(kind, requests, mean) <= t.tpot_ms / 1e3
        return in_time and self.first_token(kind, requests, mean) <= t.ttft_ms / 1e3

    def mean_of(self, requests: dict[str, int]) -> float:
        """The requests of a group over all kinds."""
        return sum(count * requests[kind] for kind, count in self.counts.items()) / sum(self.counts.values())

    def most(self, start: int, room: int) -> dict[str, int]:
        """The requests of a group of each kind that its time allows, up to `room`, from `start` of each; empty when not
        even one request is in time."""
        requests, mean = dict.fromkeys(self.counts, start), float(start)
        for _ in range(ROUNDS):
            at = mean
            found = {kind: largest_count(room, lambda n, k=kind, m=at: self.keeps(k, n, m)) for kind in self.counts}
            now = self.mean_of(found)
            if not all(found.values()) or now <= mean:
                break
            requests, mean = found, (now + mean) / 2
        mean = self.mean_of(requests)
        while late := {kind for kind, n in requests.items() if not self.keeps(kind, n, mean)}:
            several = {kind for kind, n in requests.items() if n > 1}
            if not several:
                return {}
            fewer = late & several or several
            requests = {kind: n - (kind in fewer) for kind, n in requests.items()}
            mean = self.mean_of(requests)
        return requests

    def slowest(self, requests: dict[str, int]) -> str:
        """The kind whose step takes longest."""
        mean = self.mean_of(requests)
        return max(requests, key=lambda kind: self.step(kind, requests[kind], mean).total)

    def rate(self, requests: dict[str, int]) -> float:
        """Tokens/s of all groups, with so many requests of a group of each kind."""
        mean, last = self.mean_of(requests), self.slowest(requests)
        step = self.step(last, requests[last], mean).total / self.workload.kept
        prefills = max(n / self.traffic.output * self.prefill[kind] for kind, n in requests.items())
        return sum(self.counts.values()) * mean / (step + prefills)

    def enough(self, requests: dict[str, int], wanted: float) -> tuple[dict[str, int], str]:
        """The fewest requests in proportion to these that give `wanted` tokens/s, and why these do not, if so."""
        if (rate := self.rate(requests)) < wanted:
            output = self.traffic.output
            return requests, f"serves {rate / output:.3g} requests/s, asked {wanted / output:g}"
        most = max(requests.values())

        def part(count: int) -> dict[str, int]:
            return {kind: max(1, round(n * count / most)) for kind, n in requests.items()}

        return part(largest_count(most - 1, lambda count: self.rate(part(count)) < wanted) + 1), ""

    def split(self, requests: int, room: int) -> dict[str, int]:
        """At least `requests` in all, as those of a group of each kind, so that the largest gap is as short as it can
        be with `room` for a group; empty when there is no room for so many."""
        mean = requests / sum(self.counts.values())
        found = dict.fromkeys(self.counts, 1)
        after = {kind: self.gap(kind, 2, mean) for kind in found if room > 1}
        while self.mean_of(found) < mean:
            if not after:
                return {}
            kind = min(after, key=lambda each: after[each])
            found[kind] += 1
            if found[kind] < room:
                after[kind] = self.gap(kind, found[kind] + 1, mean)
            else:
                del after[kind]
        return found


def assess_kinds(
    workload: Workload, cluster: Cluster, shape: Shape, traffic: Traffic, *, peak: float = 1.0, work: str = "all"
) -> Candidate:
    """As `planner.cost.throughput.assess`, also for devices of several kinds. Prompts that have ranks of their own
    (`work`) are those of the slowest kind. All ranks have the cache pages of the smallest kind, since a plan has one
    number of pages."""
    slow = assess(workload, cluster, shape, traffic, peak=peak, work=work)
    if not cluster.kinds or work == "prompts":
        return slow
    full = (
        slow
        if traffic.rps is None
        else assess(workload, cluster, shape, replace(traffic, rps=None), peak=peak, work=work)
    )
    if full.step is None or full.reason:
        return slow
    groups = _Groups(workload=workload, cluster=cluster, shape=shape, traffic=traffic, peak=peak, work=work)
    requests = groups.most(full.requests_per_group, requests_that_fit(workload, full.pages_per_rank, traffic))
    late = ""
    if requests and traffic.rps is not None:
        requests, late = groups.enough(requests, traffic.rps * traffic.output)
    if not requests:
        return slow
    mean, rate, last = groups.mean_of(requests), groups.rate(requests), groups.slowest(requests)
    per_user = 1 / max(groups.gap(kind, n, mean) for kind, n in requests.items())
    served = traffic.rps is not None and not slow.reason
    if slow.tokens_per_second_per_user >= per_user if served else rate <= slow.tokens_per_second:
        return slow
    return replace(
        full,
        reason=late,
        requests_per_group=int(mean),
        requests_by_kind=tuple(requests.items()),
        step=groups.step(last, requests[last], mean),
        tokens_per_second=rate,
        tokens_per_second_per_user=per_user,
        ttft_seconds=groups.first_token(last, requests[last], mean),
        memory=(*full.memory[:-1], cache_in_use(workload, shape, traffic, max(requests.values()))),
    )


def decode_steps(
    workload: Workload, cluster: Cluster, shape: Shape, traffic: Traffic, *, peak: float = 1.0, work: str = "all"
) -> Iterator[tuple[int, StepTime]]:
    """The requests of a group (their mean, where devices are of several kinds) and a step of them, for growing numbers
    up to the most that memory and `traffic` allow."""
    best = assess_kinds(workload, cluster, shape, traffic, peak=peak, work=work)
    if best.step is None:
        return
    most = best.requests_per_group
    groups = _Groups(workload=workload, cluster=cluster, shape=shape, traffic=traffic, peak=peak, work=work)
    for requests in (2**i for i in range((most - 1).bit_length())):
        if best.requests_by_kind:
            split = {kind: max(1, round(n * requests / most)) for kind, n in best.requests_by_kind}
            mean = groups.mean_of(split)
            steps = [groups.step(kind, n, mean) for kind, n in split.items()]
            yield int(mean), max(steps, key=lambda step: step.total)
        else:
            yield requests, step_time(workload, cluster, shape, requests, traffic.context, peak=peak)
    yield most, best.step


def seconds_of_requests(
    workload: Workload,
    cluster: Cluster,
    shape: Shape,
    traffic: Traffic,
    requests: int,
    *,
    peak: float = 1.0,
    work: str = "all",
) -> float:
    """Seconds between two tokens of a stream while the groups of a shape run `requests` requests in all, with prefills
    of new ones: of the slowest stream. Groups of a faster kind run more of them. Infinite without room for so many."""
    patient = replace(traffic, tpot_ms=inf, ttft_ms=inf, rps=None)
    whole = assess(workload, cluster, shape, patient, peak=peak, work=work)
    room, each = whole.requests_per_group, -(-requests // shape.data)
    if each > room:
        return inf
    step = step_time(workload, cluster, shape, each, traffic.context, peak=peak).total
    known = traffic.known
    prefill = prefill_time(workload, cluster, shape, traffic.prompt, known=known, peak=peak) if work == "all" else 0.0
    even = token_gap(step / workload.kept, prefill, each, traffic.output, engine_of(cluster.hardware))
    if not cluster.kinds or work == "prompts":
        return even
    groups = _Groups(workload=workload, cluster=cluster, shape=shape, traffic=traffic, peak=peak, work=work)
    split, mean = groups.split(requests, room), requests / shape.data
    return min(even, max((groups.gap(kind, n, mean) for kind, n in split.items()), default=inf))
