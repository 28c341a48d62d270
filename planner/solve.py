"""Problem to plan: who is alive, who holds what, with as little movement as possible."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from planner.cluster import Cluster, Device
from planner.errors import InputError
from planner.placement import adopt, fill_new, place
from planner.plan import Plan, RankPlace, as_tuples
from planner.shape import cache_pages
from planner.shape import slots_per_rank as choose_slots
from planner.workload import Workload


def solve(
    workload: Workload,
    cluster: Cluster,
    *,
    alive: Collection[int] | None = None,
    previous: Plan | None = None,
    slots_per_rank: int | None = None,
    survive_ranks: int = 1,
    loads: np.ndarray | None = None,
    epoch: int = 0,
    pages_per_rank: int | None = None,
) -> Plan:
    """A plan for the `alive` ranks (ids; all when None), valid and complete: every expert in a slot.

    `loads` is the traffic of each expert, float [moe_layers, experts], any scale; None means even.
    With `previous`, weights in place stay: lost experts replace spare copies, ranks that are new get
    copies, the slot count and the pages per rank stay as long as the experts fit.
    Raises NoFeasiblePlan, saying what is missing, when the ranks alive cannot hold the model.
    """
    devices = cluster.alive(alive)
    traffic = even_or_checked(loads, workload)
    if survive_ranks < 0:
        raise InputError(f"survive_ranks is {survive_ranks}; it must be at least 0")
    before = None if previous is None else previous.slots_per_rank
    slots = choose_slots(
        workload, cluster, len(devices), asked=slots_per_rank, before=before, survive_ranks=survive_ranks
    )
    domain = domain_index(devices)
    if previous is None:
        table = place(traffic, domain, slots)
    else:
        table = replace_lost(previous, devices, slots, traffic)
    if pages_per_rank is None:
        pages_per_rank = previous.pages_per_rank if previous else cache_pages(workload, cluster, slots)
    return Plan(
        epoch=epoch,
        ranks=tuple(RankPlace(id=d.id, host=d.host, rack=d.rack) for d in devices),
        slots_per_rank=slots,
        slots=as_tuples(table.reshape(len(table), -1)),
        experts=workload.experts,
        pages_per_rank=pages_per_rank,
        axes=(("data", len(devices)), ("tensor", 1), ("expert", len(devices))),
    )


def even_or_checked(loads: np.ndarray | None, workload: Workload) -> np.ndarray:
    """Loads as shares of their layer's traffic, float [moe_layers, experts]; InputError on a wrong shape."""
    shape = (workload.moe_layers, workload.experts)
    if loads is None:
        return np.full(shape, 1.0 / workload.experts)
    loads = np.asarray(loads, np.float64)
    if loads.shape != shape:
        raise InputError(f"loads have shape {loads.shape}; the model has [moe_layers, experts] = {shape}")
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise InputError("loads must be finite and at least 0")
    total = loads.sum(axis=1, keepdims=True)
    return np.where(total > 0, loads / np.where(total > 0, total, 1), 1.0 / workload.experts)


def domain_index(devices: tuple[Device, ...]) -> np.ndarray:
    """Index of the host of each device, int [ranks], hosts numbered as they appear."""
    hosts = {h: i for i, h in enumerate(dict.fromkeys(d.host for d in devices))}
    return np.array([hosts[d.host] for d in devices])


def replace_lost(previous: Plan, devices: tuple[Device, ...], slots: int, loads: np.ndarray) -> np.ndarray:
    """The previous table on the ranks alive, lost experts placed: int32 [layers, ranks, slots]."""
    layers, experts = loads.shape
    if (previous.moe_layers, previous.experts) != (layers, experts):
        raise InputError(
            f"the previous plan has {previous.moe_layers} layers x {previous.experts} experts, "
            f"the model {layers} x {experts}"
        )
    held = previous.slot_table().reshape(layers, len(previous.holders), previous.slots_per_rank)
    where = {rank: at for at, rank in enumerate(previous.holder_ids)}
    table = np.full((layers, len(devices), slots), -1, np.int32)
    shared = min(slots, previous.slots_per_rank)
    new = np.array([d.id not in where for d in devices])
    for at, device in enumerate(devices):
        if device.id in where:
            table[:, at, :shared] = held[:, where[device.id], :shared]
    present = np.zeros((layers, experts + 1), bool)
    present[np.arange(layers)[:, None], table.reshape(layers, -1)] = True
    table = adopt(table, ~present[:, :experts], loads)
    return fill_new(table, new, loads, domain_index(devices)) if new.any() else table
