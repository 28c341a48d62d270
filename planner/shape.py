"""Mesh axes for the ranks alive, and how many slots and cache pages each rank has room for."""

from __future__ import annotations

from math import ceil

from planner.cluster import Cluster
from planner.errors import InputError, NoFeasiblePlan
from planner.workload import Workload

MEMORY_SHARE = 0.92  # of device memory that weights and cache may take; the rest is for activations


def budget(cluster: Cluster) -> int | None:
    """Bytes of one device that weights and cache may take, None without a limit."""
    memory = cluster.hardware.memory_bytes
    return None if memory is None else int(memory * MEMORY_SHARE)


def most_slots(workload: Workload, cluster: Cluster) -> int | None:
    """Slots per rank that fit next to the other weights and one cache page; None without a limit."""
    room = budget(cluster)
    if room is None:
        return None
    return (room - workload.rest_bytes - workload.page_bytes) // workload.slot_bytes


def slots_per_rank(
    workload: Workload,
    cluster: Cluster,
    ranks: int,
    *,
    asked: int | None,
    before: int | None,
    survive_ranks: int,
) -> int:
    """Slots per rank on `ranks` ranks: `asked`, or what the plan `before` had, or enough to lose some.

    The default is ceil(E / (n - survive_ranks)), less when memory is short, never below ceil(E / n).
    NoFeasiblePlan when even that does not fit.
    """
    experts, most = workload.experts, most_slots(workload, cluster)
    if ranks < 1:
        raise NoFeasiblePlan(f"0 ranks alive for {experts} experts. Bring a rank back.")
    least = ceil(experts / ranks)
    if asked is not None:
        if asked < 1:
            raise InputError(f"slots_per_rank is {asked}; it must be at least 1")
        if asked < least:
            raise NoFeasiblePlan(
                f"{experts} experts do not fit in {asked * ranks} slots "
                f"({ranks} ranks alive x {asked} slots). Raise slots_per_rank to {least}, or bring a rank back."
            )
        chosen = asked
    elif before is not None and before >= least:
        return before
    elif before is not None:
        chosen = least
    else:
        spared = ranks - survive_ranks
        chosen = ceil(experts / spared) if spared >= 1 else least
        chosen = max(chosen, least) if most is None else max(least, min(chosen, most))
    if most is not None and chosen > most:
        raise NoFeasiblePlan(
            f"{chosen} slots per rank need {workload.rest_bytes + chosen * workload.slot_bytes:,} bytes "
            f"of weights on each of {ranks} ranks, which have {budget(cluster):,} bytes for weights and cache: room for "
            f"{max(0, most)} slots. Add ranks: {_ranks_needed(workload, most)}."
        )
    return chosen


def _ranks_needed(workload: Workload, most: int) -> str:
    if most < 1:
        return "no number of them is enough, the weights outside the experts leave no room for one slot"
    return f"{ceil(workload.experts / most)} would do"


def cache_pages(workload: Workload, cluster: Cluster, slots: int) -> int:
    """Cache pages that fit beside the weights of one rank; 0 when memory or cache size is not given."""
    room = budget(cluster)
    if room is None or not workload.page_bytes:
        return 0
    return max(0, (room - workload.rest_bytes - slots * workload.slot_bytes) // workload.page_bytes)
