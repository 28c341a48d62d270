"""From a model, a cluster and a traffic to the best mesh with its placement, and why the others lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from planner.cluster import Cluster
from planner.copies import copy_counts
from planner.deployment import Deployment, Survive
from planner.errors import InputError, NoFeasiblePlan
from planner.plan import Figure, Plan
from planner.shape import Shape, rest_bytes, shapes, slots_per_rank
from planner.solve import even_or_checked, peak_load, solve
from planner.throughput import Candidate, assess
from planner.traffic import Traffic
from planner.workload import Workload

PLACEMENTS = 3  # most placements made to compare shapes by their real balance
Layout = tuple[int, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Design:
    """The chosen deployment, what is predicted for it, and every shape compared, best first."""

    deployment: Deployment
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    peak: float


def design(
    workload: Workload,
    cluster: Cluster,
    *,
    traffic: Traffic | None = None,
    survive: Survive | None = None,
    arch: str = "collocated",
    loads: np.ndarray | None = None,
    standby: int = 0,
    slots: int | None = None,
    protect: str = "copies",
    tensor: int | None = None,
    dense: int | None = None,
) -> Design:
    """The shape with the most tokens per second that meets `traffic` and can lose what `survive` says; with
    `traffic.rps` the one that serves so many requests fastest. `slots`, `tensor` and `dense` are chosen unless given.

    Raises NoFeasiblePlan naming the best reason when no shape does.
    """
    traffic, survive = traffic or Traffic(), survive or Survive()
    devices = cluster.devices
    if not 0 <= standby < len(devices):
        raise InputError(f"{standby} standby ranks of {len(devices)}; at least one must serve")
    lost = survive.most_lost(cluster)
    load = even_or_checked(loads, workload)
    uneven = loads is not None and workload.experts > 0

    order = partial(_order, rps=traffic.rps)

    def assessed(shape: Shape, peak: float) -> Candidate:
        left = shape.holders - lost
        if left < 1 or left * shape.slots < workload.experts:
            slots_left = max(0, left) * shape.slots
            reason = f"after losing {lost} of {shape.holders} ranks {slots_left} slots for {workload.experts} experts"
            return Candidate(shape=shape, reason=reason)
        return assess(workload, cluster, shape, traffic, peak=peak)

    peaks: dict[tuple[int, int], float] = {}
    candidates = []
    widths = {"slots": slots, "tensor": tensor, "dense": dense}
    for shape in shapes(workload, cluster, devices, arch=arch, lost=lost, standby=standby, **widths):
        key = (shape.slots, shape.holders)
        if key not in peaks:
            peaks[key] = expected_peak(load, *key) if uneven else 1.0
        candidates.append(assessed(shape, peaks[key]))
    candidates.sort(key=order)
    if not candidates or candidates[0].reason:
        _explain_failure(workload, cluster, candidates, lost)
    plans: dict[Layout, tuple[Plan, float]] = {}
    while candidates[0].shape.layout not in plans and len(plans) < PLACEMENTS and not candidates[0].reason:
        best = candidates[0].shape
        plan = place_shape(workload, cluster, best, loads=loads, protect=protect)
        peak = float(peak_load(plan, load).max()) if uneven else 1.0
        plans[best.layout] = plan, peak
        candidates = [assessed(c.shape, peak) if c.shape.layout == best.layout else c for c in candidates]
        candidates.sort(key=order)
    chosen = next(c for c in candidates if c.shape.layout in plans)
    plan, peak = plans[chosen.shape.layout]
    deployment = Deployment(
        plan=_dressed(plan, chosen, peak),
        workload=workload,
        cluster=cluster,
        traffic=traffic,
        survive=survive,
        loads=() if loads is None else tuple(map(tuple, load.tolist())),
    )
    ranked = (chosen, *(c for c in candidates if c is not chosen))
    return Design(deployment=deployment, chosen=chosen, candidates=ranked, peak=peak)


def _order(candidate: Candidate, *, rps: float | None) -> tuple:
    """Best first: the most tokens, or where so many requests are asked for, the fastest for a user."""
    good = candidate.tokens_per_second_per_user if rps else candidate.tokens_per_second
    return (bool(candidate.reason), -good, candidate.shape.slots)


def _dressed(plan: Plan, chosen: Candidate, peak: float) -> Plan:
    """A placement with the groups, axes, pages and predictions of the shape that was chosen."""
    ranks = tuple(replace(r, group=g) for r, g in zip(plan.ranks, chosen.shape.groups, strict=True))
    return replace(
        plan,
        ranks=ranks,
        axes=chosen.shape.axes,
        pages_per_rank=chosen.pages_per_rank,
        cost=figures(chosen, peak),
    )


def _explain_failure(workload: Workload, cluster: Cluster, candidates: Sequence[Candidate], lost: int) -> None:
    """Raise NoFeasiblePlan with the reason of the shape that came closest."""
    n = len(cluster.devices)
    rest = min((rest_bytes(workload, c.shape.tensor, c.shape.dense) for c in candidates), default=None)
    slots_per_rank(workload, cluster, n, asked=None, before=None, survive_ranks=lost, rest=rest)
    reasons = list(dict.fromkeys(c.reason for c in candidates))
    detail = "; ".join(reasons[:3]) or "no tensor group fits on a host"
    raise NoFeasiblePlan(f"{workload.name} on {n} devices of {cluster.name}: {detail}. Add devices or relax a limit.")


def expected_peak(loads: np.ndarray, slots: int, holders: int) -> float:
    """The least load of the hottest rank over the mean that a placement can reach: its busiest copy alone."""
    counts = copy_counts(loads, slots * holders, holders)
    return float(max(1.0, (loads / counts).max() * holders / loads.sum(axis=1).max()))


def place_shape(
    workload: Workload,
    cluster: Cluster,
    shape: Shape,
    *,
    loads: np.ndarray | None = None,
    protect: str = "copies",
) -> Plan:
    """A plan with the roles of a shape and its experts placed; memory is not asked about."""
    roles = {d.id: role for d, role in zip(cluster.devices, shape.roles, strict=True)}
    unlimited = replace(cluster, hardware=replace(cluster.hardware, memory_bytes=None))
    plan = solve(
        workload, unlimited, roles=roles, slots_per_rank=shape.slots, loads=loads, protect=protect, tensor=shape.tensor
    )
    return replace(plan, axes=shape.axes)


def figures(candidate: Candidate, peak: float) -> tuple[Figure, ...]:
    """What is predicted for a candidate, as the plan's cost; every figure is an estimate."""
    step = candidate.step
    rows = [
        ("tokens_per_second", candidate.tokens_per_second, "tokens/s"),
        ("tokens_per_second_per_device", candidate.per_device(), "tokens/s"),
        ("tokens_per_second_per_user", candidate.tokens_per_second_per_user, "tokens/s"),
        ("ttft", candidate.ttft_seconds, "s"),
        ("requests_per_group", candidate.requests_per_group, "requests"),
        ("peak_load", peak, "x mean"),
    ]
    if step is not None:
        rows.append(("step", step.total, "s"))
        rows += [(f"step_{name}", seconds, "s") for name, seconds in step.parts().items()]
    rows += [(f"memory_{name.split(',')[0].replace(' ', '_')}", size, "bytes") for name, size in candidate.memory]
    return tuple(Figure(name=name, value=float(value), unit=unit) for name, value, unit in rows)
