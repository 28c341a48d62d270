"""Design: the best mesh and placement for a model, a cluster and a traffic, and why the other shapes lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from planner.cost.band import Band, band_of_work, deployment_band
from planner.cost.mixed import assess_kinds, placement_speeds
from planner.cost.throughput import Candidate
from planner.cost.trade_off import pareto
from planner.errors import InputError, NoFeasiblePlan
from planner.inputs.cluster import Cluster
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment, FaultTolerance
from planner.plan.expert_loads import load_shares
from planner.plan.plan import Figure, Plan
from planner.plan.shape import Shape
from planner.solver.balance import peak_load
from planner.solver.placement import peak_by_speed
from planner.solver.problem import Problem
from planner.solver.replicas import copy_counts
from planner.solver.shapes import mesh_shapes, rest_bytes, slots_per_rank, without_memory_limit
from planner.solver.solve import solve

PLACEMENTS = 3  # most placements made to compare shapes by their real balance
NO_SHAPE = Shape(arch="collocated", tensor=1, dense=1, slots=0, roles=(), groups=())
Layout = tuple[int, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Design:
    """The chosen deployment, the prediction for it, and every shape compared, best first.

    `peak` is the highest load of a rank over the mean, on the worst layer.
    """

    deployment: Deployment
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    peak: float

    @cached_property
    def pareto(self) -> list[dict]:
        """The trade-off between speed for a user and for a device, over the shapes compared (`trade_off.pareto`), each
        point with its `ranges`."""
        d, shapes, band = self.deployment, [c.shape for c in self.candidates if c.step], self.band(self.chosen)
        points = pareto(d.workload, d.cluster, shapes, d.traffic, peak=self.peak)
        return [
            {**point, "ranges": {name: band.around(point[name], "tpot") for name in ("per_user", "per_device")}}
            for point in points
        ]

    def band(self, candidate: Candidate) -> Band:
        """How far off predictions of the candidate's kind were."""
        return deployment_band(self.deployment, candidate.shape, candidate.requests_per_group)

    def ranges(self, candidate: Candidate) -> dict:
        """The figures of a candidate as {low, mid, high}, and the band's source, for JSON; empty without a
        prediction."""
        if candidate.step is None:
            return {}
        band = self.band(candidate)
        per_user = candidate.tokens_per_second_per_user
        figures = {
            **({"tpot_s": band.around(1 / per_user, "tpot")} if per_user else {}),
            "step_s": band.around(candidate.step.total, "tpot"),
            **{f"step_{name}_s": band.around(part, "tpot") for name, part in candidate.step.parts().items()},
            "ttft_s": band.around(candidate.ttft_seconds, "ttft"),
            "tokens_per_second": band.around(candidate.tokens_per_second, "rate"),
            "tokens_per_second_per_device": band.around(candidate.per_device(), "rate"),
            "tokens_per_second_per_user": band.around(per_user, "tpot"),
        }
        return {"band": band.to_dict(), "ranges": figures}


def design(
    workload: Workload,
    cluster: Cluster,
    *,
    traffic: Traffic | None = None,
    survive: FaultTolerance | None = None,
    arch: str = "collocated",
    loads: np.ndarray | None = None,
    standby: int = 0,
    slots: int | None = None,
    protect: str = "copies",
    tensor: int | None = None,
    dense: int | None = None,
    work: str = "all",
) -> Design:
    """The deployment with the most tokens per second that meets `traffic` and tolerates the losses of `survive`.

    With `traffic.rps` it is the shape that serves this request rate fastest for a user. `slots`, `tensor` and `dense`
    are chosen unless given; the last `standby` ranks wait for a loss. `work` is the part of requests that it computes
    (`planner.plan.deployment.WORKS`). Raises NoFeasiblePlan, with the reasons of the
    nearest shapes, when none will do.
    """
    traffic, survive = traffic or Traffic(), survive or FaultTolerance()
    comparison = _Comparison(
        workload=workload,
        cluster=cluster,
        traffic=traffic,
        lost=survive.most_lost(cluster),
        shares=load_shares(loads, workload),
        uneven=loads is not None and workload.experts > 0,
        work=work,
    )
    candidates = comparison.of_shapes(arch=arch, standby=standby, slots=slots, tensor=tensor, dense=dense)
    if not candidates or candidates[0].reason:
        _raise_infeasible(workload, cluster, candidates, survive)
    candidates, plans = comparison.place_best(candidates, loads, protect)
    chosen = next(c for c in candidates if c.shape.layout in plans)
    plan, peak = plans[chosen.shape.layout]
    band = band_of_work(workload, cluster, traffic, chosen.shape, chosen.requests_per_group, work)
    deployment = Deployment(
        plan=_with_predictions(plan, chosen, peak, band),
        workload=workload,
        cluster=cluster,
        traffic=traffic,
        survive=survive,
        loads=() if loads is None else tuple(map(tuple, comparison.shares.tolist())),
        work=work,
    )
    ranked = (chosen, *(c for c in candidates if c is not chosen))
    return Design(deployment=deployment, chosen=chosen, candidates=ranked, peak=peak)


def best_candidate(
    workload: Workload,
    cluster: Cluster,
    *,
    traffic: Traffic,
    survive: FaultTolerance | None = None,
    loads: np.ndarray | None = None,
    work: str = "all",
    protect: str = "copies",
    **shapes,
) -> Candidate:
    """The best shape of `design`, with these options, before its experts are placed (whatever `protect` says); its
    `reason` says why not even this will do."""
    comparison = _Comparison(
        workload=workload,
        cluster=cluster,
        traffic=traffic,
        lost=(survive or FaultTolerance()).most_lost(cluster),
        shares=load_shares(loads, workload),
        uneven=loads is not None and workload.experts > 0,
        work=work,
    )
    candidates = comparison.of_shapes(**shapes)
    if not candidates:
        return Candidate(shape=NO_SHAPE, reason="no tensor group fits on a host")
    return candidates[0]


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Assesses shapes for one model, cluster and traffic when any `lost` ranks may be lost.

    `shares` are the experts' shares of their layer's traffic, float [moe_layers, experts]; `uneven` is False when no
    loads were given, so that balance is left out.
    """

    workload: Workload
    cluster: Cluster
    traffic: Traffic
    lost: int
    shares: np.ndarray
    uneven: bool
    work: str = "all"

    def of_shapes(
        self,
        *,
        arch: str = "collocated",
        standby: int = 0,
        slots: int | None = None,
        tensor: int | None = None,
        dense: int | None = None,
    ) -> list[Candidate]:
        """The shapes of `mesh_shapes` with these options, best first."""
        if not 0 <= standby < len(self.cluster.devices):
            raise InputError(f"{standby} standby ranks of {len(self.cluster.devices)}; at least one must serve")
        shapes = mesh_shapes(
            self.workload,
            self.cluster,
            self.cluster.devices,
            arch=arch,
            lost=self.lost,
            standby=standby,
            slots=slots,
            tensor=tensor,
            dense=dense,
        )
        return self.assess_all(shapes)

    def assess_all(self, shapes: Iterable[Shape]) -> list[Candidate]:
        """Every shape, best first, with the least imbalance that a placement of it could reach."""
        peaks: dict[tuple[int, int], float] = {}
        candidates = []
        for shape in shapes:
            key = (shape.slots, shape.expert_rank_count)
            if key not in peaks:
                peaks[key] = expected_peak(self.shares, *key) if self.uneven else 1.0
                speed = placement_speeds(self.workload, self.cluster, shape, self.traffic.context)
                if speed is not None and shape.slots:
                    peaks[key] = max(peaks[key], peak_by_speed(speed, shape.slots, self.workload.experts))
            candidates.append(self._assess(shape, peaks[key]))
        return sorted(candidates, key=self._order)

    def place_best(
        self, candidates: list[Candidate], loads: np.ndarray | None, protect: str
    ) -> tuple[list[Candidate], dict[Layout, tuple[Plan, float]]]:
        """The candidates, best first, once the experts of the best ones are placed and their real balance is known.

        Also the plans of the layouts placed (at most PLACEMENTS), each with the load of its hottest rank over the mean.
        """
        plans: dict[Layout, tuple[Plan, float]] = {}
        while candidates[0].shape.layout not in plans and len(plans) < PLACEMENTS and not candidates[0].reason:
            best = candidates[0].shape
            speed = placement_speeds(self.workload, self.cluster, best, self.traffic.context)
            plan = place_shape(self.workload, self.cluster, best, loads=loads, protect=protect, speed=speed)
            peak = float(peak_load(plan, self.shares, speed).max()) if self.uneven or speed is not None else 1.0
            plans[best.layout] = plan, peak
            candidates = [self._assess(c.shape, peak) if c.shape.layout == best.layout else c for c in candidates]
            candidates.sort(key=self._order)
        return candidates, plans

    def _assess(self, shape: Shape, peak: float) -> Candidate:
        left, experts = shape.expert_rank_count - self.lost, self.workload.experts
        if left < 1:
            return Candidate(
                shape=shape, reason=f"no rank is left after losing {self.lost} of {shape.expert_rank_count}"
            )
        if left * shape.slots < experts:
            ranks, slots = shape.expert_rank_count, left * shape.slots
            return Candidate(
                shape=shape, reason=f"after losing {self.lost} of {ranks} ranks {slots} slots for {experts} experts"
            )
        return assess_kinds(self.workload, self.cluster, shape, self.traffic, peak=peak, work=self.work)

    def _order(self, candidate: Candidate) -> tuple:
        """Best first: the most tokens, or where a request rate is asked for, the fastest for a user."""
        for_user = self.traffic.rps and self.work != "prompts"
        good = candidate.tokens_per_second_per_user if for_user else candidate.tokens_per_second
        return (bool(candidate.reason), -good, candidate.shape.slots)


def _with_predictions(plan: Plan, chosen: Candidate, peak: float, band: Band) -> Plan:
    """A placement with the tensor groups, axes, cache pages and predictions of the chosen shape."""
    ranks = tuple(replace(r, group=g) for r, g in zip(plan.ranks, chosen.shape.groups, strict=True))
    return replace(
        plan,
        ranks=ranks,
        axes=chosen.shape.axes,
        pages_per_rank=chosen.pages_per_rank,
        cost=figures(chosen, peak, band),
    )


def _raise_infeasible(
    workload: Workload, cluster: Cluster, candidates: Sequence[Candidate], survive: FaultTolerance
) -> None:
    """Raise NoFeasiblePlan with the reasons of the shapes that came closest, and the losses that they would survive."""
    n, lost = len(cluster.devices), survive.most_lost(cluster)
    rest = min((rest_bytes(workload, c.shape.tensor, c.shape.dense) for c in candidates), default=None)
    slots_per_rank(workload, cluster, n, asked=None, before=None, survive_ranks=lost, rest=rest)
    reasons = list(dict.fromkeys(c.reason for c in candidates))
    detail = "; ".join(reasons[:3]) or "no tensor group fits on a host"
    way_out = "Add devices or relax a limit."
    bearable = max((_most_losses(workload, c.shape) for c in candidates), default=lost)
    if bearable < lost:
        way_out = f"Add devices, or ask for fewer losses than --survive {survive}: --survive ranks={bearable}."
    raise NoFeasiblePlan(f"{workload.name} on {n} devices of {cluster.name}: {detail}. {way_out}")


def _most_losses(workload: Workload, shape: Shape) -> int:
    """The most ranks that a shape may lose: one rank must be left, and a slot for every expert."""
    needed = -(-workload.experts // shape.slots) if shape.slots else 1
    return shape.expert_rank_count - max(1, needed)


def expected_peak(loads: np.ndarray, slots: int, expert_rank_count: int) -> float:
    """The lowest possible peak over mean of a placement: that of a rank with nothing but the busiest copy."""
    counts = copy_counts(loads, slots * expert_rank_count, expert_rank_count)
    return float(max(1.0, (loads / counts).max() * expert_rank_count / loads.sum(axis=1).max()))


def place_shape(
    workload: Workload,
    cluster: Cluster,
    shape: Shape,
    *,
    loads: np.ndarray | None = None,
    protect: str = "copies",
    speed: np.ndarray | None = None,
) -> Plan:
    """A plan with the roles of a shape and its experts placed (by the `speed` of ranks), as if memory had no limit."""
    problem = Problem(
        workload=workload,
        cluster=without_memory_limit(cluster),
        roles={d.id: role for d, role in zip(cluster.devices, shape.roles, strict=True)},
        slots_per_rank=shape.slots,
        loads=loads,
        protect=protect,
        tensor=shape.tensor,
        speed=speed,
    )
    return replace(solve(problem), axes=shape.axes)


def figures(candidate: Candidate, peak: float, band: Band) -> tuple[Figure, ...]:
    """The predictions for a candidate as the cost of a plan; every figure is an estimate, and times and rates have the
    ends of their band."""
    step = candidate.step
    rows = [
        ("tokens_per_second", candidate.tokens_per_second, "tokens/s", "rate"),
        ("tokens_per_second_per_device", candidate.per_device(), "tokens/s", "rate"),
        ("tokens_per_second_per_user", candidate.tokens_per_second_per_user, "tokens/s", "tpot"),
        ("ttft", candidate.ttft_seconds, "s", "ttft"),
        ("requests_per_group", candidate.requests_per_group, "requests", ""),
        *((f"requests_per_group_{kind}", count, "requests", "") for kind, count in candidate.requests_by_kind),
        ("peak_load", peak, "x mean", ""),
    ]
    if step is not None:
        rows.append(("step", step.total, "s", "tpot"))
        rows += [(f"step_{name}", seconds, "s", "tpot") for name, seconds in step.parts().items()]
    rows += [(f"memory_{name.split(',')[0].replace(' ', '_')}", size, "bytes", "") for name, size in candidate.memory]
    return tuple(band.figure(*row) for row in rows)
