"""Predicted costs of losing each rank, and each host, now: the planner's loss model with the times of this server's own
recoveries."""

import statistics
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from planner.errors import PlannerError
from planner.failures.loss_bands import LossBands, Ranges
from planner.failures.loss_model import SERVED_MEANS, LossModel
from planner.inputs.cluster import Cluster
from planner.inputs.recovery_times import RecoveryTimes
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment
from planner.plan.plan import Plan
from planner.solver.parity_groups import HostParityGroup
from serving.engine.sequence import Sequence
from serving.protocol.events import Event
from serving.protocol.status import LossCost, LossForecast

SECONDS = 1e-3
"""Of a millisecond."""

_DETECTION = ("detect",)
_ABORT = ("fence", "plan")
_ADOPTION = ("adopt",)
_FIRST_STEP = ("resume",)


def measured_recovery(events: Iterable[Event], left: int) -> RecoveryTimes:
    """The medians of the recoveries so far, with the messages to the `left` ranks that they left, and the first step;
    the planner's estimates before the first one."""
    recoveries = [event.phases for event in events if event.kind == "recovered" and "join" not in event.phases]
    if not recoveries:
        return RecoveryTimes()

    def median(names: tuple[str, ...]) -> float:
        return statistics.median(sum(phases.get(name, 0.0) for name in names) for phases in recoveries) / 1e3

    return RecoveryTimes(
        detect=median(_DETECTION),
        abort=median(_ABORT),
        adopt=median(_ADOPTION),
        first_step=median(_FIRST_STEP),
        ranks=left,
        source="measured",
    )


def loss_costs(
    plan: Plan,
    workload: Workload,
    cluster: Cluster,
    load: np.ndarray,
    recovery: RecoveryTimes,
    prepared: Iterable[int],
    *,
    kept: Iterable[HostParityGroup] = (),
) -> dict[int, LossCost]:
    """The cost of each single loss, by rank. `load` counts tokens int [moe_layers, experts]; `prepared` are the ranks
    whose loss has a connected mesh; `kept` are the parity groups that are made."""
    if len(plan.rank_ids) == 1:  # nobody would be left for the planner to price
        last = LossCost(survivable=False, prepared=False, stall_ms=0.0, experts_to_load=0, traffic=1.0, measured=False)
        return {plan.rank_ids[0]: last}
    seen = load.sum(axis=1).min() > 0 if load.size else False
    loads = tuple(map(tuple, load.astype(float).tolist())) if seen else ()
    losses, ready = (
        LossModel(
            Deployment(plan=plan, workload=workload, cluster=cluster, loads=loads),
            recovery,
            SERVED_MEANS,
            host_groups=kept,
        ),
        set(prepared),
    )
    costs = {}
    for rank in plan.rank_ids:
        outcome = losses.outcome((rank,))
        costs[rank] = LossCost(
            survivable=outcome.survivable,
            prepared=rank in ready,
            stall_ms=1e3 * outcome.stall,
            experts_to_load=outcome.means.get("store", 0),
            traffic=outcome.traffic_lost,
            measured=recovery.source == "measured",
        )
    return costs


def current_traffic(running: Collection[Sequence], max_context: int) -> Traffic:
    """The mean prompt and output lengths of the requests that run. Delays have no bound: no forecast is left out as too
    slow."""
    count = max(len(running), 1)
    prompt = sum(len(sequence.request.prompt) for sequence in running) / count
    output = sum(min(sequence.request.sampling.max_tokens, max_context) for sequence in running) / count
    return Traffic(prompt=round(max(prompt, 1)), output=round(max(output, 1)), tpot_ms=1e9, ttft_ms=1e9)


def loss_forecasts(
    deployment: Deployment,
    recovery: RecoveryTimes | None,
    prepared: Callable[[frozenset[int]], bool],
    running: Collection[Sequence],
    *,
    protected: bool = False,
    kept: Iterable[HostParityGroup] = (),
) -> tuple[LossForecast, ...]:
    """A forecast for each rank of the plan, then one for each host with several of its ranks. `prepared` says whether
    the mesh without some ranks is connected. With `protected`, KV entries of lost ranks are restored from replicas
    instead of computed again; `kept` are the parity groups that are made."""
    plan, losses = (
        deployment.plan,
        LossModel(deployment, recovery, SERVED_MEANS, recomputed=0.0 if protected else 1.0, host_groups=kept),
    )
    alive = set(plan.rank_ids)
    domains = [("rank", str(rank), (rank,)) for rank in plan.rank_ids]
    hosts = deployment.cluster.domains("host").items()
    shared = ((name, tuple(sorted(alive.intersection(ids)))) for name, ids in hosts)
    domains += [("host", name, ranks) for name, ranks in shared if len(ranks) > 1]
    bands = LossBands(losses)
    return tuple(
        _forecast(losses, bands, kind, name, ranks, prepared, running, protected) for kind, name, ranks in domains
    )


def _forecast(
    losses: LossModel,
    bands: LossBands,
    kind: str,
    name: str,
    ranks: tuple[int, ...],
    prepared: Callable[[frozenset[int]], bool],
    running: Collection[Sequence],
    protected: bool,
) -> LossForecast:
    groups = losses.deployment.plan.groups
    concerned = {mate for rank in ranks for mate in groups.get(rank, ())}
    moved = [sequence for sequence in running if sequence.rank in concerned]
    head = {"kind": kind, "name": name, "ranks": ranks, "requests_moved": len(moved)}
    head["tokens_recomputed"] = 0 if protected else sum(sequence.computed for sequence in moved)
    try:
        outcome = losses.outcome(ranks, kind=kind, name=name)
    except PlannerError as error:
        nothing = dict.fromkeys(("stall_ms", "moved_stall_ms", "capacity", "traffic_lost"), 0.0)
        return LossForecast(**head, **nothing, survivable=False, reason=str(error), prepared=False, experts_loaded=0)
    return LossForecast(
        **head,
        **_ends(bands.of(outcome)),
        range_source=bands.source(),
        survivable=outcome.survivable,
        reason=outcome.reason,
        prepared=outcome.survivable and prepared(frozenset(ranks)),
        experts_loaded=outcome.means.get("store", 0),
        stall_ms=outcome.stall / SECONDS,
        moved_stall_ms=outcome.moved_stall / SECONDS,
        capacity=outcome.capacity,
        traffic_lost=outcome.traffic_lost,
    )


def _ends(ranges: Ranges) -> dict[str, Any]:
    """The ends of the ranges as fields of a LossForecast; none for a loss that is not survivable."""
    found: dict[str, Any] = {}
    for name, each in ranges.items():
        head, unit = (name, "") if name == "capacity" else (name.removesuffix("_ms"), "_ms")
        found |= {f"{head}_low{unit}": each["low"], f"{head}_high{unit}": each["high"]}
    return found
