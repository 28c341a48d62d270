"""What the loss of each rank would cost now, as the planner prices it from this server's own recoveries."""

import statistics
from collections.abc import Iterable

import numpy as np

from planner.cluster import Cluster
from planner.degrade import SERVED, Losses
from planner.deployment import Deployment
from planner.parity import KeptGroup
from planner.plan import Plan
from planner.recovery import Recovery
from planner.workload import Workload
from serving.status import Event, LossCost

_DETECTION = ("detect",)
_ABORT = ("fence", "plan")
_ADOPTION = ("adopt", "resume")


def measured(events: Iterable[Event]) -> Recovery:
    """Medians of what the recoveries so far took; the planner's estimates before the first."""
    told = [event.phases for event in events if event.kind == "recovered" and "join" not in event.phases]
    if not told:
        return Recovery()

    def median(names: tuple[str, ...]) -> float:
        return statistics.median(sum(phases.get(name, 0.0) for name in names) for phases in told) / 1e3

    return Recovery(detect=median(_DETECTION), abort=median(_ABORT), adopt=median(_ADOPTION), source="measured")


def loss_costs(
    plan: Plan,
    workload: Workload,
    cluster: Cluster,
    load: np.ndarray,
    recovery: Recovery,
    prepared: Iterable[int],
    *,
    kept: Iterable[KeptGroup] = (),
) -> dict[int, LossCost]:
    """The cost of each single loss by rank. `load` counts tokens int [moe_layers, experts]; `prepared` are the ranks
    whose loss has its mesh compiled, loaded and connected; `kept` the parity there is."""
    if len(plan.rank_ids) == 1:  # nobody would be left for the planner to price
        last = LossCost(survivable=False, prepared=False, stall_ms=0.0, experts_to_load=0, traffic=1.0, measured=False)
        return {plan.rank_ids[0]: last}
    seen = load.sum(axis=1).min() > 0 if load.size else False
    loads = tuple(map(tuple, load.astype(float).tolist())) if seen else ()
    losses, ready = (
        Losses(Deployment(plan=plan, workload=workload, cluster=cluster, loads=loads), recovery, SERVED, kept=kept),
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
